"""Layouts of two or more answers in one row, from HelpSteer to Nectar, and of answers side by side or in a list."""

import re
from collections.abc import Mapping
from typing import Any

from reward_model.data.layouts.base import Layout, choice, items, number, pair, prompt_columns, ranking, text_source
from reward_model.data.rows import Row


def _helpsteer3(row: Row) -> dict[str, Any]:
    verdict = -number(row, "overall_preference")  # from -3, response 1 is much better, to 3
    return pair(row["context"], row["response1"], row["response2"], verdict, source=text_source(row, "domain"))


def _helpsteer2_preference(row: Row) -> dict[str, Any]:
    return pair(row["prompt"], row["response_1"], row["response_2"], -number(row, "preference_strength"))


def _shp(row: Row) -> dict[str, Any]:
    verdict = choice(row, "labels", {"1": 1, "0": -1})
    return pair(row["history"], row["human_ref_A"], row["human_ref_B"], verdict, source=text_source(row, "domain"))


def _safe_rlhf(row: Row) -> dict[str, Any]:
    verdict = choice(row, "better_response_id", {"0": 1, "1": -1})
    source = text_source(row, "prompt_source")
    return pair(row["prompt"], row["response_0"], row["response_1"], verdict, source=source)


def _webgpt(row: Row) -> dict[str, Any]:
    question = row["question"]
    text = question.get("full_text") if isinstance(question, Mapping) else question
    source = text_source(question, "dataset") if isinstance(question, Mapping) else None
    verdict = number(row, "score_0") - number(row, "score_1")
    both = pair(text, row["answer_0"], row["answer_1"], verdict, source=source)
    # its authors treat a score of 0 as a soft label of 50 % (Nakano et al. 2021)
    return both if verdict else {**both, "tie": None, "preference": 0.5}


def _summaries(row: Row) -> dict[str, Any]:
    info, (first, second) = row["info"], [item["text"] for item in items(row, "summaries", "text")[:2]]
    if not isinstance(info, Mapping) or not isinstance(info.get("post") or info.get("article"), str):
        raise ValueError("field 'info' must hold a 'post' or an 'article'.")
    if info.get("post"):  # the prompt of Stiennon et al. 2020, appendix B
        prompt = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {info['post']}\n\nTL;DR:"
    else:
        prompt = f"Article: {info['article']}\n\nTL;DR:"
    return pair(prompt, first, second, choice(row, "choice", {"0": 1, "1": -1}))


def _arena(row: Row) -> dict[str, Any]:
    verdicts = {"model_a": 1, "model_b": -1, "tie": 0, "tie (bothbad)": 0}
    return pair(None, row["conversation_a"], row["conversation_b"], choice(row, "winner", verdicts))


def _stack_exchange(row: Row) -> dict[str, Any]:
    return pair(row["question"], row["response_j"], row["response_k"], 1)


def _ultrafeedback(row: Row) -> dict[str, Any] | None:
    answers = items(row, "completions", "response")
    name = (
        "overall_score" if all(answer.get("overall_score") is not None for answer in answers) else "fine-grained_score"
    )
    scores = [number(answer, name) for answer in answers]
    responses = [answer["response"] for answer in answers]
    return ranking(prompt_columns(row)[0], responses, scores, source=text_source(row, "source"))


def _nectar(row: Row) -> dict[str, Any] | None:
    answers = items(row, "answers", "answer", "rank")
    return ranking(row["prompt"], [one["answer"] for one in answers], [-number(one, "rank") for one in answers])


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


LIST_NAMES = ("responses", "generations", "answers", "outputs")
SCORE_NAMES = ("scores", "ratings", "ranks")


def _lists(row: Row) -> dict[str, Any] | None:
    answers = next(row[name] for name in LIST_NAMES if row.get(name))
    name = next(name for name in SCORE_NAMES if row.get(name))
    values = row[name]
    if not isinstance(values, list | tuple) or not isinstance(answers, list | tuple) or len(values) != len(answers):
        raise ValueError(f"field {name!r} must hold one number for each of the answers, got {values!r:.60}.")
    rated = [(answer, value) for answer, value in zip(answers, values, strict=True) if answer and value is not None]
    scores = [number({name: value}, name) for _, value in rated]
    sign = -1 if name == "ranks" else 1
    return ranking(prompt_columns(row)[0], [answer for answer, _ in rated], [sign * score for score in scores])


_SIDES = re.compile(r"(response|answer|completion|output|reply|chosen|rejected|text)[ _-]?(a|b|[0-9])?$")
WINNER_NAMES = ("winner", "preferred", "preference", "better", "choice", "label")


def sides(row: Row) -> list[str]:
    """The columns of a row that hold answers side by side: response_a, response_b; response1, response2; ..."""
    found = [str(name) for name in row if isinstance(name, str) and (m := _SIDES.match(name)) and m[2] and row[name]]
    stems = {_SIDES.sub(r"\1", name) for name in found}
    return sorted(found) if len(found) > 1 and len(stems) == 1 else []


def side_of(value: Any, names: list[str]) -> str | None:
    """The column that a verdict names: by its name, or by what ends it (`a`, `model_a`, 1 of output_1)."""
    said = (
        str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower().replace(" ", "")
    )
    for name in names:
        last = name[-1].lower()
        if said in (name.lower(), name.lower().replace("_", ""), last, f"model_{last}", f"response_{last}"):
            return name
    return None


def winner_column(row: Row) -> str | None:
    """The column that says which of the answers side by side is the better one."""
    return next((name for name in WINNER_NAMES if isinstance(row.get(name), str | int | float)), None)


def _side_by_side(row: Row) -> dict[str, Any] | None:
    names, column = sides(row), winner_column(row)
    value = row[column] if column else None
    prompt, _ = prompt_columns(row)
    if isinstance(value, str) and value.strip().lower().startswith("tie"):
        return ranking(prompt, [row[name] for name in names], [0.0] * len(names))
    best = side_of(value, names)
    if best is None:
        raise ValueError(f"field {column!r} must name one of {names} or be 'tie', got {value!r:.40}.")
    return ranking(prompt, [row[name] for name in names], [float(name == best) for name in names])


def is_best_of_k(row: Row) -> bool:
    """Whether a row has lists of texts where others have one completion, as RewardBench 2."""
    return any(isinstance(row.get(name), list | tuple) and _texts(row, name) for name in ("chosen", "rejected"))


def _texts(row: Row, name: str) -> list[str]:
    value = row.get(name)
    texts = [value] if isinstance(value, str) else value
    are_texts = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
    return list(texts or []) if are_texts else []


def _best_of_k(row: Row) -> dict[str, Any]:
    """A ranking of two ranks: the correct completions before the others."""
    sides = {name: _texts(row, name) for name in ("chosen", "rejected")}
    for name, texts in sides.items():
        if not texts:
            raise ValueError(f"field {name!r} must be a list of one or more texts, got {row.get(name)!r:.60}.")
    correct, count = len(sides["chosen"]), row.get("num_correct")
    if count is not None and count != correct:
        raise ValueError(f"field 'num_correct' is {count!r:.40}, but 'chosen' has {correct} completions.")
    for name in ("id", "subset"):
        if not isinstance(row.get(name), str | int | None):
            raise ValueError(f"field {name!r} must be text, got {type(row[name]).__name__}.")
    ranks = [0] * correct + [1] * len(sides["rejected"])
    source, group = str(row.get("subset") or ""), str(row.get("id") or "")
    completions = sides["chosen"] + sides["rejected"]
    return {"prompt": row.get("prompt"), "completions": completions, "ranks": ranks, "source": source, "group": group}


BEST_OF_K = Layout(name="RewardBench 2", needs=(), uses=("id", "subset", "num_correct"), convert=_best_of_k)
SIDE_BY_SIDE = Layout(name="answers side by side", needs=(), convert=_side_by_side)
LISTS = Layout(name="answers in a list", needs=(), convert=_lists)
ANSWERS = (
    Layout(
        name="HelpSteer3", needs=("context", "response1", "response2", "overall_preference"), uses=("domain",),
        convert=_helpsteer3,
    ),
    Layout(
        name="HelpSteer2 preferences", needs=("prompt", "response_1", "response_2", "preference_strength"),
        convert=_helpsteer2_preference,
    ),
    Layout(name="SHP", needs=("history", "human_ref_A", "human_ref_B", "labels"), uses=("domain",), convert=_shp),
    Layout(
        name="PKU-SafeRLHF", needs=("prompt", "response_0", "response_1", "better_response_id"),
        uses=("prompt_source",), convert=_safe_rlhf,
    ),
    Layout(name="WebGPT", needs=("question", "answer_0", "answer_1", "score_0", "score_1"), convert=_webgpt),
    Layout(name="TL;DR comparisons", needs=("info", "summaries", "choice"), convert=_summaries),
    Layout(name="Chatbot Arena", needs=("conversation_a", "conversation_b", "winner"), convert=_arena),
    Layout(name="StackExchange pairs", needs=("question", "response_j", "response_k"), convert=_stack_exchange),
    Layout(
        name="UltraFeedback", needs=("instruction", "completions"), uses=("source",), convert=_ultrafeedback,
        fits=lambda row: _holds_objects(row["completions"]),
    ),
    Layout(
        name="Nectar", needs=("prompt", "answers"), convert=_nectar, fits=lambda row: _holds_objects(row["answers"]),
    ),
)  # fmt: skip
