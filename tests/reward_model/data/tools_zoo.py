"""Rows in the shapes that other tools read and write, and sets of human judgments, as in `zoo`."""

import csv
import json
from pathlib import Path
from typing import Any

from tests.reward_model.data.zoo import PublicSet, answers, assistant, parquet, user


def array(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def pandas_json(rows: list[dict[str, Any]], path: Path) -> None:
    """`DataFrame.to_json` without arguments: columns of values by row number."""
    path.write_text(json.dumps({name: {str(n): row[name] for n, row in enumerate(rows)} for name in rows[0]}))


def wrapped_json(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps({"version": "1.0", "data": rows}))


def table(rows: list[dict[str, Any]], path: Path) -> None:
    """As spreadsheets write it: lists as JSON, separated by what the suffix says, semicolons in `.semicolon.csv`."""
    separator = "\t" if path.suffix == ".tsv" else ";" if ".semicolon" in path.name else ","
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in row.values()])


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


QUESTION, SYSTEM = [user("Name a fruit.")], {"role": "system", "content": "Be brief."}
PEAR_BEFORE_FIG: list[Any] = [(QUESTION, answers("A pear.", "A fig."), (0, 1))]
PLAIN: list[Any] = [("Name a fruit.", ("A pear.", "A fig."), (0, 1))]
TWO_TURNS = [*QUESTION, assistant("A fig."), user("Another?"), assistant("A plum.")]
OTHER_TURNS = [*QUESTION, assistant("A pear."), user("Another?"), assistant("A nut.")]

TOOLS_ZOO = [
    PublicSet(
        name="LLaMA-Factory, ShareGPT ranking", file="dpo.json", write=array,
        rows=[{"conversations": [{"from": "system", "value": "Be brief."}, human("Name a fruit.")],
               "chosen": gpt("A pear."), "rejected": gpt("A fig.")}],
        expected=[([SYSTEM, *QUESTION], answers("A pear.", "A fig."), (0, 1))],
    ),
    PublicSet(
        name="LLaMA-Factory, Alpaca with two outputs", file="comparison.json", write=array,
        rows=[{"instruction": "Name a fruit", "input": "with an a.", "output": ["A pear.", "A fig."],
               "history": [["Hello.", "Hello!"]]}],
        expected=[([user("Hello."), assistant("Hello!"), user("Name a fruit\n\nwith an a.")],
                   answers("A pear.", "A fig."), (0, 1))],
    ),
    PublicSet(
        name="LLaMA-Factory, KTO", file="kto_messages.json", write=array,
        rows=[{"messages": [*QUESTION, assistant(text)], "label": label}
              for text, label in (("A fig.", False), ("A pear.", True))],
        expected=PEAR_BEFORE_FIG,
    ),
    PublicSet(
        name="axolotl (chatml.argilla)", file="argilla.jsonl",
        rows=[{"system": "Be brief.", "instruction": "Name a fruit.", "chosen_response": "A pear.",
               "rejected_response": "A fig."}],
        expected=[([SYSTEM, *QUESTION], answers("A pear.", "A fig."), (0, 1))],
    ),
    PublicSet(
        name="axolotl (chat_template)", file="turns.jsonl",
        rows=[{"messages": QUESTION, "chosen": assistant("A pear."), "rejected": assistant("A fig.")}],
        expected=PEAR_BEFORE_FIG,
    ),
    PublicSet(
        name="OpenAI preference fine-tuning", file="openai.jsonl",
        rows=[{"input": {"messages": QUESTION, "tools": [], "parallel_tool_calls": True},
               "preferred_output": [assistant("A pear.")], "non_preferred_output": [assistant("A fig.")]}],
        expected=PEAR_BEFORE_FIG,
    ),
    PublicSet(
        name="distilabel, Intel orca pairs", file="orca.parquet", write=parquet,
        rows=[{"system": "Be brief.", "input": "Name a fruit.", "chosen": "A pear.", "rejected": "A fig.",
               "generations": ["A fig.", "A pear."], "rating": [5.0, 9.0], "status": "swapped"}],
        expected=[([SYSTEM, *QUESTION], answers("A pear.", "A fig."), (0, 1))],
    ),
    PublicSet(
        name="distilabel (input, generations, rating)", file="ultrafeedback.parquet", write=parquet,
        rows=[{"input": "Name a fruit.", "generations": ["A fig.", "Red.", "A pear."], "rating": [3.0, None, 5.0]}],
        expected=PLAIN,
    ),
    PublicSet(
        name="Capybara preferences", file="capybara.parquet", write=parquet,
        rows=[{"source": "Dove", "conversation": [{"input": "Name a fruit.", "output": "A fig."}],
               "original_response": "A fig.", "prompt": "Name a fruit.", "chosen": [*QUESTION, assistant("A pear.")],
               "rejected": [*QUESTION, assistant("A fig.")], "rating_chosen": 5, "rating_rejected": 2}],
        expected=PEAR_BEFORE_FIG, sources=("Dove",),
    ),
    PublicSet(
        name="Tulu 3 preference mixture", file="tulu.parquet", write=parquet,
        rows=[{"id": "1", "source": "if", "prompt": "Another?", "chosen_model": "m", "rejected_model": "n",
               "chosen": TWO_TURNS, "rejected": [*TWO_TURNS[:3], assistant("Red.")]}],
        expected=[(TWO_TURNS[:3], answers("A plum.", "Red."), (0, 1))], sources=("if",),
    ),
    PublicSet(
        name="UltraInteract pairs", file="ultrainteract.parquet", write=parquet,
        rows=[{"task": "Math", "trajectory": [{"from": "user", "value": "Name a fruit."}], "chosen": "A pear.",
               "rejected": "A fig.", "id": "1", "parent_id": "0"}],
        expected=PEAR_BEFORE_FIG,
    ),
    PublicSet(
        name="MT-Bench human judgments", file="mt_bench.parquet", write=parquet,
        rows=[{"question_id": 81, "winner": winner, "conversation_a": TWO_TURNS, "conversation_b": OTHER_TURNS,
               "turn": turn} for turn, winner in ((1, "model_b"), (2, "model_a"))],
        expected=[PEAR_BEFORE_FIG[0], (QUESTION, (TWO_TURNS[1:], OTHER_TURNS[1:]), (0, 1))],
    ),
    PublicSet(
        name="LMSYS arena (Kaggle)", file="lmsys.csv", write=table,
        rows=[{"id": 1, "model_a": "m", "model_b": "n", "prompt": ["Name a fruit."], "response_a": ["A fig."],
               "response_b": ["A pear."], "winner_model_a": a, "winner_model_b": b, "winner_tie": tie}
              for a, b, tie in ((0, 1, 0), (0, 0, 1))],
        expected=[*PEAR_BEFORE_FIG, (QUESTION, answers("A fig.", "A pear."), (0, 0))],
    ),
    PublicSet(
        name="Arena human preference (140k)", file="arena_140k.parquet", write=parquet,
        rows=[{"id": "1", "winner": winner, **{f"conversation_{side}": [
                   {"role": role, "content": [{"type": "text", "text": text, "image": None}]}
                   for role, text in (("user", "Name a fruit."), ("assistant", answer))]
               for side, answer in (("a", "A pear."), ("b", "A fig."))}} for winner in ("model_a", "both_bad")],
        expected=[*PEAR_BEFORE_FIG, (QUESTION, answers("A pear.", "A fig."), (0, 0))],
    ),
    PublicSet(
        name="MultiPref", file="multipref.jsonl",
        rows=[{"text": "Name a fruit.", "completion_a": "A fig.", "completion_b": "A pear.",
               "normal_worker_annotations": [{"overall_pref": "A-is-clearly-better"}, {"overall_pref": "Tie"}],
               "expert_worker_annotations": [{"overall_pref": "B-is-slightly-better"}] * 2}],
        expected=PLAIN,
    ),
    PublicSet(
        name="Prometheus preferences", file="prometheus.jsonl",
        rows=[{"orig_instruction": "Name a fruit.", "orig_response_A": "A fig.", "orig_response_B": "A pear.",
               "orig_preference": "B", "orig_criteria": "Is it sweet?"}],
        expected=PLAIN,
    ),
    PublicSet(
        name="RewardBench", file="rewardbench.jsonl",
        rows=[{"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A fig.", "subset": "easy", "id": 1}],
        expected=PLAIN, sources=("easy",),
    ),
    PublicSet(
        name="PPE", file="ppe.jsonl",
        rows=[{"prompt": "Name a fruit.", "response_1": "A fig.", "response_2": "A pear.", "winner": "model_b"}],
        expected=PLAIN,
    ),
    PublicSet(
        name="Answers as objects", file="judged.jsonl",
        rows=[{"prompt": "Name a fruit.",
               "responses": [{"text": "A fig.", "score": 1}, {"text": "A pear.", "score": 4}]}],
        expected=PLAIN,
    ),
    PublicSet(
        name="Scores side by side", file="scores.semicolon.csv", write=table,
        rows=[{"prompt": "Name a fruit.", "response_a": "A fig.", "response_b": "A pear.", "score_a": "3,5",
               "score_b": "4,25"}],
        expected=PLAIN,
    ),
    PublicSet(
        name="better and worse, pos and neg", file="pairs.tsv", write=table,
        rows=[{"question": "Name a fruit.", "better": "A pear.", "worse": "A fig."}], expected=PLAIN,
    ),
    PublicSet(
        name="pandas' to_json", file="frame.json", write=pandas_json,
        rows=[{"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A fig."},
              {"prompt": "Name a nut.", "chosen": "A nut.", "rejected": "A fig."}],
        expected=[*PLAIN, ("Name a nut.", ("A nut.", "A fig."), (0, 1))],
    ),
    PublicSet(
        name="A list in an object", file="export.json", write=wrapped_json,
        rows=[{"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "A fig."}], expected=PLAIN,
    ),
]  # fmt: skip
