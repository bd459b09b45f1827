"""Layouts of public datasets, recognized by the names of their columns."""

from collections.abc import Callable, Mapping
from typing import Any

from reward_model.data.layouts.answers import SCORE_NAMES, is_tie, texts
from reward_model.data.layouts.base import (
    Layout,
    are_objects,
    as_list,
    choice,
    items,
    number,
    pair_columns,
    prompt_columns,
    text_source,
)
from reward_model.data.rows import Row

Verdict = Callable[[Row, str], float]


def _judged(name: str, prompt: str, first: str, second: str, column: str, verdict: Verdict, source: str = "") -> Layout:
    """A set of two answers, with the column that holds the verdict on them."""

    def convert(row: Row) -> dict[str, Any]:
        return pair_columns(row[prompt], row[first], row[second], verdict(row, column), source=text_source(row, source))

    return Layout(
        name=name, needs=(prompt, first, second, column), uses=(source,) * bool(source), convert=convert,
        verdict=column if column not in (first, second) else "",
    )  # fmt: skip


def _second_is_better(row: Row, column: str) -> float:
    """A number that is above 0 where the second answer is better, as in HelpSteer: from -3 to 3."""
    return -number(row, column)


def _one_of(first: str, second: str) -> Verdict:
    return lambda row, column: choice(row, column, {first: 1, second: -1})


def _webgpt(row: Row) -> dict[str, Any]:
    question = row["question"]
    text = question.get("full_text") if isinstance(question, Mapping) else question
    source = text_source(question, "dataset") if isinstance(question, Mapping) else None
    verdict = number(row, "score_0") - number(row, "score_1")
    both = pair_columns(text, row["answer_0"], row["answer_1"], verdict, source=source)
    # its authors treat a score of 0 as a soft label of 50 % (Nakano et al. 2021)
    return both if verdict else {**both, "tie": None, "preference": 0.5}


def _summaries(row: Row) -> dict[str, Any]:
    info, summaries = row["info"], items(row, "summaries", "text")
    if len(summaries) < 2:
        raise ValueError(f"field 'summaries' must hold two summaries, got {len(summaries)}.")
    first, second = (item["text"] for item in summaries[:2])
    if not isinstance(info, Mapping) or not isinstance(info.get("post") or info.get("article"), str):
        raise ValueError("field 'info' must hold a 'post' or an 'article'.")
    if info.get("post"):  # the prompt of Stiennon et al. 2020, appendix B
        prompt = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {info['post']}\n\nTL;DR:"
    else:
        prompt = f"Article: {info['article']}\n\nTL;DR:"
    return pair_columns(prompt, first, second, choice(row, "choice", {"0": 1, "1": -1}))


def _arena(row: Row) -> dict[str, Any]:
    verdict = 0 if is_tie(row["winner"]) else choice(row, "winner", {"model_a": 1, "model_b": -1, "tie": 0})
    first, second = (_first_turns(row[name], row.get("turn")) for name in ("conversation_a", "conversation_b"))
    return pair_columns(None, first, second, verdict)


def _first_turns(conversation: Any, turns: Any) -> Any:
    """A conversation up to the answer that was judged: MT-Bench's judges saw one turn, or both."""
    if not isinstance(turns, int) or not are_objects(conversation):
        return conversation
    answers = [index for index, message in enumerate(conversation) if message.get("role") == "assistant"]
    return conversation[: answers[turns - 1] + 1] if 0 < turns < len(answers) else conversation


def _lmsys(row: Row) -> dict[str, Any]:
    verdict = number(row, "winner_model_a") - number(row, "winner_model_b")
    asked, first, second = (as_list(row[name]) or [row[name]] for name in ("prompt", "response_a", "response_b"))
    if not len(asked) == len(first) == len(second):
        raise ValueError(
            f"field 'prompt' has {len(asked)} turns, 'response_a' {len(first)} and 'response_b' {len(second)}: each "
            "question needs both answers."
        )
    return pair_columns(None, _turns(asked, first), _turns(asked, second), verdict)


def _turns(asked: list[Any], answers: list[Any]) -> list[dict[str, Any]]:
    turns = zip(asked, answers, strict=True)
    return [{"role": role, "content": turn[n]} for turn in turns for n, role in enumerate(("user", "assistant"))]


def _multipref(row: Row) -> dict[str, Any]:
    """The majority of all annotators."""
    names = ("normal_worker_annotations", "expert_worker_annotations")
    votes = [vote for name in names if row.get(name) for vote in items(row, name, "overall_pref")]
    said = [str(vote["overall_pref"]).lower()[:2] for vote in votes]
    return pair_columns(row["text"], row["completion_a"], row["completion_b"], said.count("a-") - said.count("b-"))


def _openai(row: Row) -> dict[str, Any]:
    asked = row["input"]
    return pair_columns(
        asked["messages"], row["preferred_output"], row["non_preferred_output"], 1, tools=asked.get("tools")
    )


def _two_outputs(row: Row) -> dict[str, Any]:
    first, second = row["output"]
    return pair_columns(prompt_columns(row)[0], first, second, 1)


PUBLIC_SETS = (
    _judged("HelpSteer3", "context", "response1", "response2", "overall_preference", _second_is_better, "domain"),
    _judged("HelpSteer2 preferences", "prompt", "response_1", "response_2", "preference_strength", _second_is_better),
    _judged("SHP", "history", "human_ref_A", "human_ref_B", "labels", _one_of("1", "0"), "domain"),
    _judged(
        "PKU-SafeRLHF", "prompt", "response_0", "response_1", "better_response_id", _one_of("0", "1"), "prompt_source",
    ),
    _judged(
        "Prometheus preferences", "orig_instruction", "orig_response_A", "orig_response_B", "orig_preference",
        _one_of("a", "b"),
    ),
    Layout(name="WebGPT", needs=("question", "answer_0", "answer_1", "score_0", "score_1"), convert=_webgpt),
    Layout(name="TL;DR comparisons", needs=("info", "summaries", "choice"), convert=_summaries, verdict="choice"),
    Layout(
        name="Chatbot Arena", needs=("conversation_a", "conversation_b", "winner"), uses=("turn",), convert=_arena,
        verdict="winner",
    ),
    _judged("StackExchange pairs", "question", "response_j", "response_k", "response_j", lambda row, column: 1),
    Layout(
        name="LMSYS arena", convert=_lmsys,
        needs=("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
    ),
    Layout(
        name="MultiPref", needs=("text", "completion_a", "completion_b", "normal_worker_annotations"),
        uses=("expert_worker_annotations",), convert=_multipref,
    ),
    Layout(
        name="OpenAI preferences", needs=("input", "preferred_output", "non_preferred_output"), convert=_openai,
        fits=lambda row: isinstance(row["input"], Mapping),
    ),
    Layout(
        name="Alpaca's columns with two outputs", needs=("instruction", "output"), uses=("input", "system", "history"),
        convert=_two_outputs, fits=lambda row: len(texts(row, "output")) == 2 and not any(map(row.get, SCORE_NAMES)),
    ),
)  # fmt: skip
