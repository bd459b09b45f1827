"""Tokenize comparisons, and make batches of them for the trainer."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from trl.trainer.reward_trainer import DataCollatorForPreference

from reward_model.data.comparisons import Comparison
from reward_model.data.rows import BadRow, OnBadRow, set_aside
from reward_model.models.contract import TextRule
from reward_model.models.text import encode
from rlhf_ppo.batch import pad_rows
from rlhf_ppo.chat.nested import UnreadableText

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodedComparisons:
    """Token ids of the comparisons within the length limit, and the number of dropped ones."""

    dataset: Dataset
    kept: list[Comparison]
    """The comparisons of `dataset`, in its order."""
    too_long: int
    """Number of comparisons with a text of more than `max_length` tokens, which are dropped."""
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    """Comparisons that cannot be encoded and were skipped: location, reason, content."""


def encode_comparisons(
    comparisons: Sequence[Comparison], tokenizer: Any, rule: TextRule, *, on_bad_row: OnBadRow = "stop"
) -> EncodedComparisons:
    """Tokenize comparisons; drop and count those with a text longer than `rule.max_length`.

    The columns are those of trl's preference collator (`chosen_ids`, `rejected_ids`: best and worst) plus the label
    details and, for more than two completions, `middle_ids` and `ranks`.

    Raises:
        BadRow: The chat template refuses a comparison, or makes two of its completions equal, with on_bad_row="stop".
        ValueError: Nothing is left.
    """
    encoded, bad_rows = _encoded(comparisons, tokenizer, rule, on_bad_row)
    fitting = [(comparison, ids) for comparison, ids in encoded if max(map(len, ids)) <= rule.max_length]
    kept, rows = [comparison for comparison, _ in fitting], [_row(*pair) for pair in fitting]
    too_long = len(encoded) - len(fitting)
    if not rows:
        raise ValueError(
            f"None of the {len(comparisons)} comparisons can be used: {too_long} have a text above max_length="
            f"{rule.max_length} tokens, {len(bad_rows)} cannot be encoded. Raise max_length or check the columns."
        )
    if too_long:
        logger.warning(
            "%d of %d comparisons are left out: they have a text of more than max_length=%d tokens.",
            too_long, len(comparisons), rule.max_length,
        )  # fmt: skip
    _warn_of_hidden_fields(kept, tokenizer, rule)
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})
    return EncodedComparisons(dataset=dataset, kept=kept, too_long=too_long, bad_rows=bad_rows)


def _warn_of_hidden_fields(comparisons: Sequence[Comparison], tokenizer: Any, rule: TextRule) -> None:
    """Log how many comparisons have tools or tool calls that the chat template never reads."""
    if rule.template != "chat":
        return
    counts = {"tools": 0, "tool_calls": 0}
    for comparison in comparisons:
        texts = [text for text in (comparison.prompt, *comparison.completions) if not isinstance(text, str)]
        counts["tools"] += bool(comparison.tools)
        counts["tool_calls"] += any("tool_calls" in message for text in texts for message in text)
    for name, count in counts.items():
        if count and name not in str(tokenizer.chat_template):
            logger.warning(
                "%d of %d comparisons have %s, which the chat template does not show: the reward model will not see "
                "them. Use a model whose template does, or set tokenizer.chat_template.",
                count, len(comparisons), name,
            )  # fmt: skip


def encode_comparison(comparison: Comparison, tokenizer: Any, rule: TextRule) -> list[list[int]]:
    """Token ids of each completion with its prompt.

    Raises:
        BadRow: The chat template refuses the conversation, or two completions of different ranks have the same tokens.
    """
    try:
        ids = [
            encode(tokenizer, rule, comparison.prompt, text, truncate=False, tools=comparison.tools)
            for text in comparison.completions
        ]
    except UnreadableText as error:
        raise BadRow(f"{comparison.where}: {error}") from error
    places = set(zip(map(tuple, ids), range(2) if comparison.is_pair else comparison.ranks, strict=True))
    if len({row for row, _ in places}) < len(places):
        raise BadRow(
            f"{comparison.where}: two completions become the same tokens: what tells them apart (reasoning, a tool "
            "call, spaces) is not in the text that the chat template and the tokenizer make. The comparison says "
            "nothing: use a template that shows it, or leave the row out."
        )
    return ids


def split_encodable(
    comparisons: Sequence[Comparison], tokenizer: Any, rule: TextRule, *, on_bad_row: OnBadRow
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """The comparisons that can be encoded, and the bad rows that were skipped; errors as of `encode_comparisons`."""
    encoded, bad_rows = _encoded(comparisons, tokenizer, rule, on_bad_row)
    return [comparison for comparison, _ in encoded], bad_rows


def _encoded(
    comparisons: Sequence[Comparison], tokenizer: Any, rule: TextRule, on_bad_row: OnBadRow
) -> tuple[list[tuple[Comparison, list[list[int]]]], list[dict[str, Any]]]:
    """Each comparison with its token ids, and the bad rows that were skipped."""
    encoded, bad_rows = [], []
    for comparison in comparisons:
        try:
            encoded.append((comparison, encode_comparison(comparison, tokenizer, rule)))
        except BadRow as error:
            bad_rows.append(set_aside(error, comparison.where, asdict(comparison), on_bad_row))
    return encoded, bad_rows


def fill_last_step(dataset: Dataset, batch_size: int) -> Dataset:
    """Append rows that do not count until the optimizer steps are whole: data loaders would repeat comparisons instead.

    The rows are copies of the shortest pair with weight 0 and length 0, which marks them.
    """
    missing = -len(dataset) % batch_size
    if not missing:
        return dataset
    lengths = list(dataset["length"])
    shortest = dataset[lengths.index(min(lengths))]
    row = shortest | {"middle_ids": [], "ranks": [0, 1], "weight": 0.0, "length": 0}
    filler = Dataset.from_dict({name: [value] * missing for name, value in row.items()}, features=dataset.features)
    return concatenate_datasets([dataset, filler])


def fingerprint(comparisons: Sequence[Comparison]) -> str:
    """SHA-256 of the contents of the comparisons, in order."""
    digest = hashlib.sha256()
    for comparison in comparisons:
        digest.update(f"{comparison.key()}|{comparison.margin}|{comparison.weight}\n".encode())
    return digest.hexdigest()


def _row(comparison: Comparison, ids: list[list[int]]) -> dict[str, Any]:
    return {
        "chosen_ids": ids[0],
        "rejected_ids": ids[-1],
        "middle_ids": ids[1:-1],
        "ranks": list(comparison.ranks),
        "margin": 0.0 if comparison.is_tie else comparison.margin,
        "weight": comparison.weight,
        "preference": 0.5 if comparison.is_tie else comparison.preference,
        "tie": comparison.is_tie,
        "length": max(map(len, ids)),
    }


@dataclass
class ComparisonCollator(DataCollatorForPreference):
    """trl's collator (chosen rows, then rejected rows, padded on the right) with further label columns.

    The middle completions of rankings follow below. `groups` [comparisons, K] holds the rows of each comparison, best
    first, padded by -1, and `ranks` the rank of each.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in ("weight", "preference"):
            batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float)
        batch["tie"] = torch.tensor([bool(example["tie"]) for example in examples])
        batch["decided"] = ~batch["tie"] & (batch["preference"] != 0.5)
        batch["counted"] = torch.tensor([example["length"] > 0 for example in examples])
        groups, position = [], 2 * len(examples)
        for index, example in enumerate(examples):
            between = range(position, position + len(example["middle_ids"]))
            position += len(between)
            groups.append(torch.tensor([index, *between, len(examples) + index]))
        batch["groups"] = pad_rows(groups, value=-1)
        batch["ranks"] = pad_rows([torch.tensor(example["ranks"]) for example in examples], value=-1)
        middles = [torch.tensor(ids) for example in examples for ids in example["middle_ids"]]
        if middles:
            ends = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            rows = [row[mask.bool()] for row, mask in ends] + middles
            batch["input_ids"] = pad_rows(rows, value=self.pad_token_id)
            batch["attention_mask"] = pad_rows([torch.ones_like(row) for row in rows], value=0)
        return batch


class LengthGroupedBatches(Sampler[int]):
    """Samples a new order each epoch, in which the texts of an optimizer step have similar lengths, to save padding.

    Unlike transformers' sampler, the order depends on seed and epoch alone, neither on the number of processes nor on
    how a step is cut into micro-batches, and steps of long and short texts come in random order.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, fillers: int = 0, pool: int = 32) -> None:
        """Set up the sampler.

        Args:
            lengths: Tokens of each example.
            batch_size: Examples per optimizer step, over all processes.
            fillers: Number of rows behind the examples that only fill the last step.
            pool: Number of steps that are sorted by length together; a larger pool pads less and mixes less.
        """
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.fillers = fillers
        self.pool = pool * batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        steps: list[list[int]] = []
        for start in range(0, len(order), self.pool):
            block = sorted(order[start : start + self.pool], key=lambda index: self.lengths[index])
            steps += [block[at : at + self.batch_size] for at in range(0, len(block), self.batch_size)]
        partial = [step for step in steps if len(step) < self.batch_size]
        whole = [step for step in steps if len(step) == self.batch_size]
        mixed = [whole[index] for index in torch.randperm(len(whole), generator=generator).tolist()]
        fillers = range(len(self.lengths), len(self))
        return iter([index for step in [*mixed, *partial, fillers] for index in step])
