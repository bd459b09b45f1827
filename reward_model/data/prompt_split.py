"""Separate the prompt from completions that repeat it."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from rlhf_ppo.chat.messages import Text
from rlhf_ppo.chat.nested import UnreadableText

_ANSWER_STARTS = re.compile(
    r"(?:^|\s)(?:#+ ?)?(?:assistant|bot|gpt|chatbot):|(?:^|\n)[ \t]*(?:#+ ?)?(?:ai|model|a|answer|response):"
    r"|<\|assistant\|>\n?|<\|im_start\|>assistant\n|\[/INST\]|<start_of_turn>model\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|\bTL;DR:",
    re.IGNORECASE,
)
"""Where an answer starts in a transcript or in a rendered conversation."""
_SENTENCE_ENDS = re.compile(r"\n|[.?!:;](?=\s)")
_SYSTEM = ("system", "developer")
_FEWEST_WORDS = 3
"""Words that a shared beginning needs to count as a prompt."""


def split_prompt(prompt: Text | None, completions: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """Prompt and completions, each said once.

    Completions that begin with the prompt lose it. Without a prompt, it is the messages that all completions share at
    the start, or the shared beginning of transcripts up to the last answer's start.

    Raises:
        UnreadableText: The completions are conversations of which `prompt` is no part.
    """
    if all(isinstance(completion, str) for completion in completions):
        if prompt is not None and not isinstance(prompt, str):
            answers = [[{"role": "assistant", "content": completion}] for completion in completions]
            return prompt, tuple(answers)
        return _split_texts(prompt or "", [str(completion) for completion in completions])
    return _split_messages(prompt or "", [list(completion) for completion in completions])


def shared_beginning(completions: Sequence[Text]) -> str:
    """The beginning that texts without a prompt share, up to the last end of a sentence; "" if it is too short."""
    if not all(isinstance(completion, str) for completion in completions):
        return ""
    shared = _common_prefix([str(completion) for completion in completions])
    ends = [match.end() for match in _SENTENCE_ENDS.finditer(shared)]
    beginning = shared[: ends[-1]] if ends else shared.rpartition(" ")[0]
    return beginning.strip() if len(beginning.split()) >= _FEWEST_WORDS else ""


def _common_prefix(texts: Sequence[str]) -> str:
    lowest, highest = min(texts), max(texts)  # what these two share, all share
    return lowest[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(lowest, highest, strict=False)))]


def _split_texts(prompt: str, completions: list[str]) -> tuple[str, tuple[str, ...]]:
    shared = _common_prefix(completions)
    starts = [match.end() for match in _ANSWER_STARTS.finditer(shared)]
    if starts and (not prompt or prompt.strip() in shared[: starts[-1]]):
        prompt = shared[: starts[-1]]
        return prompt, tuple(completion[len(prompt) :] for completion in completions)
    for said, texts in ((prompt, completions), (prompt.strip(), [completion.lstrip() for completion in completions])):
        if _repeats(said, texts):
            return said, tuple(text[len(said) :] for text in texts)
    return prompt, tuple(completions)


def _repeats(prompt: str, completions: list[str]) -> bool:
    """Whether the completions hold the prompt; a short one may be an answer's own first words ("Hello")."""
    if not prompt.strip() or not all(text.startswith(prompt) and len(text) > len(prompt) for text in completions):
        return False
    return (
        len(prompt.split()) >= _FEWEST_WORDS
        or not prompt[-1].isalnum()
        or all(text[len(prompt)].isspace() for text in completions)
    )


def _split_messages(prompt: Text, completions: list[list[Any]]) -> tuple[Text, tuple[Text, ...]]:
    shared = 0
    while shared < min(map(len, completions)) - 1 and all(
        text[shared] == completions[0][shared] for text in completions
    ):
        shared += 1
    beginning, first_role = completions[0][:shared], completions[0][0]["role"]
    rest = tuple(completion[shared:] for completion in completions)
    if not prompt:
        return beginning, rest
    if isinstance(prompt, str):
        if first_role not in (*_SYSTEM, "user"):
            return [{"role": "user", "content": prompt}], tuple(completions)
        if not any(message["role"] == "user" for completion in completions for message in completion):
            return [*beginning, {"role": "user", "content": prompt}], rest
        said = [message["content"] or "" for message in beginning]
        if any(_squeezed(prompt) in _squeezed(text) for text in said):
            return beginning, rest
    else:
        turns: list[Any] = list(prompt)
        asked = [turn for turn in turns if turn["role"] not in _SYSTEM]
        for said in (turns, asked):  # completions may repeat the prompt with its system message or without
            if said and all(text[: len(said)] == said and len(text) > len(said) for text in completions):
                return turns, tuple(completion[len(said) :] for completion in completions)
        if any(beginning[start : start + len(turns)] == turns for start in range(shared)):
            return beginning, rest
        if turns[-1]["role"] != "user" or first_role not in (*_SYSTEM, "user"):
            return turns, tuple(completions)
    raise UnreadableText(
        "field 'prompt' is not part of the conversations that the completions hold: it is unknown what was "
        "asked. Repair the row, or leave the column out (--columns prompt=)."
    )


def _squeezed(text: str) -> str:
    return " ".join(text.split())
