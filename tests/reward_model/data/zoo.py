"""Rows in the exact shape of well-known preference sets, and the comparisons that they stand for.

The contents are made up; columns, nesting and quirks are those of the published files. `EXPECTED` is
(prompt, completions best first, ranks) for each comparison.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

Expected = tuple[Any, tuple[Any, ...], tuple[int, ...]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def answers(*texts: str) -> tuple[list[dict[str, str]], ...]:
    return tuple([assistant(text)] for text in texts)


def jsonl(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def jsonl_gz(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """As the hub stores it: nested columns of one schema, nulls where a row lacks a field."""
    Dataset.from_list(rows).to_parquet(str(path))


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A well-known set in small."""

    name: str
    file: str
    rows: list[dict[str, Any]]
    expected: list[Expected]
    write: Callable[[list[dict[str, Any]], Path], None] = jsonl
    flags: tuple[str, ...] = ()
    """Flags beyond --data, where the shape alone does not tell."""
    sources: tuple[str, ...] = ()
    """`Comparison.source` of each, if the set says."""
    undecided: int = 0
    tools: list[dict[str, Any]] = field(default_factory=list)


ZOO: list[PublicSet] = []


def add(**fields: Any) -> None:
    ZOO.append(PublicSet(**fields))


HH = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Tea or coffee?\n\nAssistant:"
add(
    name="Anthropic HH-RLHF", file="train.jsonl.gz", write=jsonl_gz,
    rows=[
        {"chosen": f"{HH} I like tea.", "rejected": f"{HH} I like nothing."},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: "},
    ],
    expected=[
        (HH, (" I like tea.", " I like nothing."), (0, 1)),
        ("\n\nHuman: Why?\n\nAssistant:", (" Because.", " "), (0, 1)),
    ],
)  # fmt: skip

add(
    name="UltraFeedback binarized", file="train_prefs.parquet", write=parquet,
    rows=[
        {
            "prompt": "Name a fruit.", "prompt_id": "a1",
            "chosen": [{"content": "Name a fruit.", "role": "user"}, {"content": "Fig.", "role": "assistant"}],
            "rejected": [{"content": "Name a fruit.", "role": "user"}, {"content": "Ham.", "role": "assistant"}],
            "messages": [{"content": "Name a fruit.", "role": "user"}, {"content": "Fig.", "role": "assistant"}],
            "score_chosen": 8.5, "score_rejected": 2.0,
        },
    ],
    expected=[([user("Name a fruit.")], answers("Fig.", "Ham."), (0, 1))],
)  # fmt: skip


def _ultrafeedback_answer(response: str, score: float) -> dict[str, Any]:
    rated = {"Rating": "4", "Rationale": "Good."}
    return {
        "annotations": {"helpfulness": {**rated, "Type": ["1"]}, "honesty": rated, "instruction_following": rated},
        "custom_system_prompt": "Be helpful.", "fine-grained_score": score / 2, "critique": "Fine.", "model": "m",
        "overall_score": score, "principle": "helpfulness", "response": response,
    }  # fmt: skip


add(
    name="UltraFeedback (scored)", file="evol_instruct.jsonl",
    rows=[
        {
            "source": "evol_instruct", "instruction": "Name a fruit.", "models": ["m", "n", "o", "p"],
            "completions": [
                _ultrafeedback_answer(text, score)
                for text, score in [("Plum.", 7.0), ("Ham.", 1.0), ("Fig.", 8.5), ("Pear.", 7.0)]
            ],
            "correct_answers": ["None"], "incorrect_answers": ["None"],
        },
        {
            "source": "evol_instruct", "instruction": "Name a tree.", "models": ["m", "n", "o"],
            "completions": [_ultrafeedback_answer(text, 5.0) for text in ("Oak.", "Elm.", "Ash.")],
            "correct_answers": ["None"], "incorrect_answers": ["None"],
        },
    ],
    expected=[("Name a fruit.", ("Fig.", "Plum.", "Pear.", "Ham."), (0, 1, 1, 2))],
    sources=("evol_instruct",), undecided=1,
)  # fmt: skip

POST = "SUBREDDIT: r/tea\n\nTITLE: Cold tea\n\nPOST: My tea was cold.\n\nTL;DR:"
_INFO = {
    "id": "t3_1",
    "post": "My tea was cold.",
    "title": "Cold tea",
    "subreddit": "tea",
    "site": None,
    "article": None,
}
_NEWS = {"id": "c1", "post": None, "title": "News", "subreddit": None, "site": "cnn", "article": "It rained."}
add(
    name="TL;DR comparisons", file="comparisons.jsonl", rows=[{"info": info, "split": "train",
                                                               "summaries": [{"text": first, "policy": "sup1",
                                                                              "note": None}, {"text": second,
                                                                                              "policy": "ppo",
                                                                                              "note": None}],
                                                               "choice": choice, "worker": "w",
                                                               "batch": "batch3.json",
                                                               "extra": {"confidence": None}} for info, first, second,
                                                              choice in [(_INFO, " Tea is a drink.", " Tea was cold.",
                                                                          1), (_NEWS, " Rain.", " Sun.", 0)]],
    expected=[(POST, (" Tea was cold.", " Tea is a drink."), (0, 1)), ("Article: It rained.\n\nTL;DR:", (" Rain.",
                                                                                                         " Sun."), (0,
                                                                                                                    1))],
)  # fmt: skip
add(
    name="TL;DR preference", file="tldr.parquet", write=parquet,
    rows=[{"prompt": POST, "chosen": " Tea was cold.", "rejected": " Tea is a drink."}],
    expected=[(POST, (" Tea was cold.", " Tea is a drink."), (0, 1))],
)  # fmt: skip

add(
    name="HelpSteer 2", file="train.jsonl.gz", write=jsonl_gz, rows=[{"prompt": prompt, "response": response,
                                                                      "helpfulness": score, "correctness": 4,
                                                                      "coherence": 4, "complexity": 1,
                                                                      "verbosity": 2} for prompt, response,
                                                                     score in [("Name a fruit.", "Ham.", 1),
                                                                               ("Name a fruit.", "Fig.", 4),
                                                                               ("Name a tree.", "Oak.", 3),
                                                                               ("Name a tree.", "Elm.", 3)]],
    expected=[("Name a fruit.", ("Fig.", "Ham."), (0, 1))], undecided=2,
)  # fmt: skip
add(
    name="HelpSteer 2 preferences", file="preference.jsonl.gz", write=jsonl_gz,
    rows=[
        {
            "split": "train", "prompt": prompt, "response_1": "One.", "response_2": "Two.",
            "preference_strength": strength, "preference_statement": "s", "preference_elaboration": "e",
            "three_most_similar_preferences": [{"statement": "s", "elaboration": "e", "strength": strength}],
            "all_preferences_unprocessed": [{"strength": strength, "statement": "s", "elaboration": "e"}],
        }
        for prompt, strength in [("a?", -3), ("b?", 2), ("c?", 0)]
    ],
    expected=[
        ("a?", ("One.", "Two."), (0, 1)), ("b?", ("Two.", "One."), (0, 1)), ("c?", ("One.", "Two."), (0, 0)),
    ],
)  # fmt: skip
add(
    name="HelpSteer 3", file="train.jsonl.gz", write=jsonl_gz,
    rows=[
        {
            "domain": "general", "language": "english",
            "context": [user("Hi"), assistant("Hello."), user("Tea?")], "response1": "Yes.", "response2": "No.",
            "overall_preference": preference,
            "individual_preference": [{"score": preference, "reasoning": "r", "feedback1": "f", "feedback2": "f"}],
        }
        for preference in (-2, 1, 0)
    ],
    expected=[
        ([user("Hi"), assistant("Hello."), user("Tea?")], answers(*texts), ranks)
        for texts, ranks in [(("Yes.", "No."), (0, 1)), (("No.", "Yes."), (0, 1)), (("Yes.", "No."), (0, 0))]
    ],
    sources=("general",) * 3,
)  # fmt: skip

add(
    name="Nectar", file="rlaif.parquet", write=parquet, rows=[{"prompt": "\n\nHuman: Name a fruit.\n\nAssistant: ",
                                                               "answers": [{"answer": text, "model": "gpt-4",
                                                                            "rank": rank} for text, rank in [("Ham.",
                                                                                                              3.0),
                                                                                                             ("Fig.",
                                                                                                              1.0),
                                                                                                             ("Plum.",
                                                                                                              2.0)]],
                                                               "turns": 1, "num_responses": 3, "source": ["sharegpt"],
                                                               "good_natured": True}],
    expected=[("\n\nHuman: Name a fruit.\n\nAssistant: ", ("Fig.", "Plum.", "Ham."), (0, 1, 2))],
)  # fmt: skip

add(
    name="SHP", file="train.json", rows=[{"post_id": "p1", "domain": "askculinary_train", "upvote_ratio": 0.98,
                                          "history": "How to boil an egg?", "c_root_id_A": "a", "c_root_id_B": "b",
                                          "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 5, "score_B": 9,
                                          "human_ref_A": "In oil.", "human_ref_B": "In water.", "labels": label,
                                          "seconds_difference": 1.0, "score_ratio": 1.8} for label in (0, 1)],
    expected=[("How to boil an egg?", ("In water.", "In oil."), (0, 1)), ("How to boil an egg?", ("In oil.",
                                                                                                  "In water."), (0,
                                                                                                                 1))],
    sources=("askculinary_train",) * 2,
)  # fmt: skip

add(
    name="Argilla (versions before 2)", file="argilla.parquet", write=parquet,
    rows=[
        {
            "prompt": "Name a fruit.", "response1": "Ham.", "response2": "Fig.",
            "preference": [
                {"user_id": user_id, "value": {"rank": [1, 2], "value": order}, "status": status}
                for user_id, order, status in [
                    ("u1", ["response2", "response1"], "submitted"),
                    ("u2", ["response1", "response2"], "discarded"),
                ]
            ],
            "preference-suggestion": {"rank": [1, 2], "value": ["response1", "response2"]},
            "preference-suggestion-metadata": {"type": None, "score": None, "agent": None},
            "external_id": None, "metadata": "{}",
        },
        {
            "prompt": "Name a tree.", "response1": "Elm.", "response2": "Egg.", "preference": [],
            "preference-suggestion": {"rank": [1, 2], "value": ["response1", "response2"]},
            "preference-suggestion-metadata": {"type": "model", "score": None, "agent": "gpt"},
            "external_id": None, "metadata": "{}",
        },
    ],
    expected=[("Name a fruit.", ("Fig.", "Ham."), (0, 1)), ("Name a tree.", ("Elm.", "Egg."), (0, 1))],
)  # fmt: skip
add(
    name="Argilla (version 2)", file="records.parquet", write=parquet,
    rows=[
        {
            "id": "1", "status": "completed", "_server_id": "s", "instruction": "Name a fruit.",
            "response_a": "Ham.", "response_b": "Fig.",
            "preference.responses": ["response_b", "response_b", "response_a"],
            "preference.responses.users": ["u1", "u2", "u3"], "preference.responses.status": ["submitted"] * 3,
            "preference.suggestion": None, "preference.suggestion.score": None, "preference.suggestion.agent": None,
        }
    ],
    expected=[("Name a fruit.", ("Fig.", "Ham."), (0, 1))],
)  # fmt: skip
add(
    name="Argilla, binarized", file="cleaned.parquet", write=parquet,
    rows=[
        {
            "source": "evol_instruct", "prompt": "Name a fruit.",
            "chosen": [user("Name a fruit."), assistant("Fig.")], "chosen-rating": 5.0, "chosen-model": "m",
            "rejected": [user("Name a fruit."), assistant("Ham.")], "rejected-rating": 2.0, "rejected-model": "n",
        }
    ],
    expected=[([user("Name a fruit.")], answers("Fig.", "Ham."), (0, 1))], sources=("evol_instruct",),
)  # fmt: skip

add(
    name="orca_dpo_pairs", file="orca_rlhf.jsonl", rows=[{"system": system, "question": "Name a fruit.",
                                                          "chosen": "Fig.",
                                                          "rejected": "Ham."} for system in ("Be brief.", "")],
    expected=[([{"role": "system", "content": "Be brief."}, user("Name a fruit.")], answers("Fig.", "Ham."), (0, 1)),
              ([user("Name a fruit.")], answers("Fig.", "Ham."), (0, 1))],
)  # fmt: skip

add(
    name="KTO", file="kto.jsonl", rows=[{"prompt": prompt, "completion": completion, "label": label} for prompt,
                                        completion, label in [("Name a fruit.", "Fig.", True), ("Name a tree.",
                                                                                                "Oak.", True),
                                                              ("Name a fruit.", "Ham.", False), ("Name a fruit.",
                                                                                                 "Egg.", False)]],
    expected=[("Name a fruit.", ("Fig.", "Ham.", "Egg."), (0, 1, 1))], undecided=1,
)  # fmt: skip
add(
    name="KTO, conversations", file="kto.parquet", write=parquet,
    rows=[
        {"prompt": [user("Name a fruit.")], "completion": [assistant(text)], "label": label}
        for text, label in [("Ham.", False), ("Fig.", True)]
    ],
    expected=[([user("Name a fruit.")], answers("Fig.", "Ham."), (0, 1))],
)  # fmt: skip

_HARM = {"Endangering National Security": False, "Violence": False}
add(
    name="PKU-SafeRLHF", file="train.jsonl",
    rows=[
        {
            "prompt": "How to open a tin?", "response_0": "With a knife.", "response_1": "With an opener.",
            "prompt_source": "Alpaca3-70B", "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca-7B",
            "is_response_0_safe": False, "is_response_1_safe": True, "response_0_harm_category": _HARM,
            "response_1_harm_category": _HARM, "response_0_severity_level": 1, "response_1_severity_level": 0,
            "better_response_id": 0, "safer_response_id": 1, "response_0_sha256": "0", "response_1_sha256": "1",
        }
    ],
    expected=[("How to open a tin?", ("With a knife.", "With an opener."), (0, 1))], sources=("Alpaca3-70B",),
)  # fmt: skip
add(
    name="PKU-SafeRLHF, by safety", file="train.jsonl", rows=ZOO[-1].rows, sources=("Alpaca3-70B",),
    flags=("--columns", "better_response_id=safer_response_id"),
    expected=[("How to open a tin?", ("With an opener.", "With a knife."), (0, 1))],
)  # fmt: skip

add(
    name="Skywork preference", file="skywork.parquet", write=parquet, rows=[{"chosen": [user("Name a fruit."),
                                                                                        assistant("Fig.")],
                                                                             "rejected": [user("Name a fruit."),
                                                                                          assistant("Ham.")],
                                                                             "source": "magpie_pro_llama3.1"}],
    expected=[([user("Name a fruit.")], answers("Fig.", "Ham."), (0, 1))], sources=("magpie_pro_llama3.1",),
)  # fmt: skip

add(
    name="WebGPT comparisons", file="comparisons.jsonl",
    rows=[
        {
            "question": {"dataset": "eli5", "id": "q1", "full_text": "Why is the sky blue?"},
            "quotes_0": {"title": ["A"], "extract": ["b"]}, "answer_0": "Paint.",
            "tokens_0": {"prefix": [1], "completion": [2]}, "score_0": -score,
            "quotes_1": {"title": [], "extract": []}, "answer_1": "Scattering.",
            "tokens_1": {"prefix": [1], "completion": [3]}, "score_1": score,
        }
        for score in (0.75, 0.0)
    ],
    expected=[
        ("Why is the sky blue?", ("Scattering.", "Paint."), (0, 1)),
        ("Why is the sky blue?", ("Paint.", "Scattering."), (0, 1)),
    ],
    sources=("eli5",) * 2,
)  # fmt: skip


def _oasst(key: str, parent: str | None, role: str, text: str, rank: int | None) -> dict[str, Any]:
    return {
        "message_id": key, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50", "text": text,
        "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
        "synthetic": False, "model_name": None, "detoxify": {"toxicity": 0.0}, "message_tree_id": "m1",
        "tree_state": "ready_for_export", "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    }  # fmt: skip


_MESSAGES = [
    _oasst("m1", None, "prompter", "Name a fruit.", None), _oasst("m2", "m1", "assistant", "Ham.", 1),
    _oasst("m3", "m1", "assistant", "Fig.", 0), _oasst("m4", "m3", "prompter", "Another?", None),
    _oasst("m5", "m4", "assistant", "Plum.", 0), _oasst("m6", "m4", "assistant", "No.", 2),
    _oasst("m7", "m4", "assistant", "Pear.", 1), _oasst("m8", "m2", "prompter", "Really?", None),
    _oasst("m9", "m8", "assistant", "No.", None),
]  # fmt: skip
_OASST: list[Expected] = [
    ([user("Name a fruit.")], answers("Fig.", "Ham."), (0, 1)),
    ([user("Name a fruit."), assistant("Fig."), user("Another?")], answers("Plum.", "Pear.", "No."), (0, 1, 2)),
]
add(
    name="OpenAssistant messages", file="train.parquet", write=parquet, rows=_MESSAGES, expected=_OASST,
    sources=("en", "en"),
)  # fmt: skip


def _tree(key: str) -> dict[str, Any]:
    (message,) = [one for one in _MESSAGES if one["message_id"] == key]
    replies = [_tree(one["message_id"]) for one in _MESSAGES if one["parent_id"] == key]
    kept = {name: message[name] for name in ("message_id", "parent_id", "text", "role", "lang", "deleted", "rank")}
    return {**kept, "replies": replies}


add(
    name="OpenAssistant trees", file="ready.trees.jsonl.gz", write=jsonl_gz, sources=("en", "en"),
    rows=[{"message_tree_id": "m1", "tree_state": "ready_for_export", "prompt": _tree("m1")}], expected=_OASST,
)  # fmt: skip


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant", "content": None,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }  # fmt: skip


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]  # fmt: skip
add(
    name="Tool-call preferences", file="tools.parquet", write=parquet, tools=_TOOLS,
    rows=[
        {
            "tools": _TOOLS, "prompt": [user("Weather in Rome?")], "chosen": [_call("weather", city="Rome")],
            "rejected": [_call("search", query="Rome")],
        }
    ],
    expected=[
        (
            [user("Weather in Rome?")],
            ([_call("weather", city="Rome")], [_call("search", query="Rome")]), (0, 1),
        )
    ],
)  # fmt: skip

_SYSTEM = {"role": "system", "content": "Be brief."}
add(
    name="Chat with system prompts", file="chat.jsonl",
    rows=[
        {
            "chosen": [_SYSTEM, user("Name a fruit."), assistant("Fig.")],
            "rejected": [_SYSTEM, user("Name a fruit."), assistant("Ham.")],
        },
        {"system": "Be brief.", "prompt": "Name a tree.", "chosen": "Oak.", "rejected": "Egg."},
        {
            "system": "Be brief.", "conversations": [{"from": "human", "value": "Name a bird."}],
            "chosen": {"from": "gpt", "value": "Owl."}, "rejected": {"from": "gpt", "value": "Oak."},
        },
    ],
    expected=[
        ([_SYSTEM, user("Name a fruit.")], answers("Fig.", "Ham."), (0, 1)),
        ([_SYSTEM, user("Name a tree.")], answers("Oak.", "Egg."), (0, 1)),
        ([_SYSTEM, user("Name a bird.")], answers("Owl.", "Oak."), (0, 1)),
    ],
)  # fmt: skip
add(
    name="Chatbot Arena", file="arena.parquet", write=parquet,
    rows=[
        {
            "question_id": "q", "model_a": "x", "model_b": "y", "winner": winner, "judge": "j",
            "conversation_a": [{"content": "Hi", "role": "user"}, {"content": "Hello.", "role": "assistant"}],
            "conversation_b": [{"content": "Hi", "role": "user"}, {"content": "Go.", "role": "assistant"}],
            "turn": 1, "anony": True, "language": "English", "tstamp": 1.0,
        }
        for winner in ("model_a", "model_b", "tie (bothbad)")
    ],
    expected=[
        ([user("Hi")], answers("Hello.", "Go."), (0, 1)), ([user("Hi")], answers("Go.", "Hello."), (0, 1)),
        ([user("Hi")], answers("Hello.", "Go."), (0, 0)),
    ],
)  # fmt: skip
add(
    name="StackExchange paired", file="stack.parquet", write=parquet, rows=[{"qid": 1, "question": "How to sort?",
                                                                             "date": "2023/01/01", "metadata": ["a",
                                                                                                                "b",
                                                                                                                "c"],
                                                                             "response_j": "With sort().",
                                                                             "response_k": "By hand."}],
    expected=[("How to sort?", ("With sort().", "By hand."), (0, 1))],
)  # fmt: skip
add(
    name="Alpaca's columns (DPO)", file="dpo.json", write=lambda rows,
    path: path.write_text(json.dumps(rows)) and None, rows=[{"instruction": "Translate.", "input": "chat",
                                                             "chosen": "cat", "rejected": "dog"},
                                                            {"instruction": "Name a fruit.", "input": "",
                                                             "chosen": "Fig.", "rejected": "Ham."}],
    expected=[("Translate.\n\nchat", ("cat", "dog"), (0, 1)), ("Name a fruit.", ("Fig.", "Ham."), (0, 1))],
)  # fmt: skip
add(
    name="distilabel (generations, ratings)", file="distilabel.parquet", write=parquet,
    rows=[{"instruction": "Name a fruit.", "generations": ["Ham.", "Fig.", "Plum."], "ratings": [1.0, 5.0, 4.0],
           "rationales": ["r", "r", "r"], "model_name": "m"}], expected=[("Name a fruit.", ("Fig.", "Plum.", "Ham."),
                                                                          (0, 1, 2))],
)  # fmt: skip
add(
    name="AlpacaEval preferences", file="annotations.json", write=lambda rows,
    path: path.write_text(json.dumps(rows)) and None, rows=[{"instruction": "Name a fruit.", "output_1": "Ham.",
                                                             "generator_1": "g", "output_2": "Fig.",
                                                             "generator_2": "h", "preference": 2.0}],
    expected=[("Name a fruit.", ("Fig.", "Ham."), (0, 1))],
)  # fmt: skip
