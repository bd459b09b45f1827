"""Sums with the interface of a reasoning-gym dataset, and step-by-step solutions of a teacher who makes slips."""

import random
import re
from typing import Any

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast


class Sums:
    """Three numbers from 1 to 9, added or subtracted: "8+7-9="."""

    def __init__(self, *, size: int, seed: int) -> None:
        generator = random.Random(seed)
        texts = []
        for _ in range(size):
            first, *others = (str(generator.randint(1, 9)) for _ in range(3))
            texts.append(first + "".join(generator.choice("+-") + number for number in others))
        self.problems = [{"question": f"{text}=", "answer": worked(text).rpartition("=")[2]} for text in texts]

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.problems[index]

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1 for the right answer, 0 for any other."""
        return float(answer == entry["answer"])


class Expressions:
    """A data set of reasoning-gym that asks for its sums without words: "12+7-15=".

    Args:
        dataset: The data set; its questions end with a sum.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.score_answer = dataset, dataset.score_answer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        problem = self.dataset[index]
        found = re.search(r"-?\d+(?: ?[-+] ?\d+)+(?= ?=)", problem["question"])
        if found is None:
            raise ValueError(
                f"expected problems that are sums, got {problem['question']!r}: there are no worked solutions to "
                "imitate. Use the family chain_sum."
            )
        return {**problem, "question": found[0].replace(" ", "") + "="}


def worked(expression: str, generator: random.Random | None = None, slips: float = 0.0) -> str:
    """Sums from left to right: "12+7-15" gives "19-15=4".

    Args:
        expression: Numbers with + and - between them.
        generator: Draws slips.
        slips: Share of steps whose result is wrong by 1 to 5.
    """
    total, *others = (int(term) for term in re.findall(r"[+-]?\d+", expression))
    steps = []
    for number, term in enumerate(others, 1):
        total += term
        if generator is not None and generator.random() < slips:
            total += generator.choice((-1, 1)) * generator.randint(1, 5)
        steps.append(str(total) + "".join(f"{later:+d}" for later in others[number:]))
    return "=".join(steps or [str(total)])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; "." ends a reply."""
    tokenizer = Tokenizer(WordLevel({text: index for index, text in enumerate(["<pad>", ".", *"=+-0123456789"])}))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=".")
