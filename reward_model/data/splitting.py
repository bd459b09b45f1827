"""Split comparisons into training and held-out parts that share no prompt."""

import json
import random
from collections.abc import Sequence

from reward_model.data.comparisons import Comparison
from reward_model.data.prompt_split import shared_beginning

_BEGINNING = "begins with "


def split_by_prompt(
    comparisons: Sequence[Comparison], *, fraction: float, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Split into (train, held-out) such that no group is in both.

    A group is what `Comparison.group` names; else the comparisons of one prompt; without prompts, those whose
    completions begin alike or, if they do not, share a completion.

    Args:
        fraction: Share that is held out, in (0, 1), up to the size of one group.

    Raises:
        ValueError: A side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The held-out fraction must be in (0, 1), got {fraction}.")
    groups = _linked_groups(comparisons)
    random.Random(seed).shuffle(groups)
    held_out: list[int] = []
    for group in groups:
        if len(held_out) >= fraction * len(comparisons):
            break
        held_out += group
    if not held_out or len(held_out) == len(comparisons):
        raise ValueError(
            f"{len(comparisons)} comparisons share prompts in {len(groups)} groups: too few to hold out {fraction:.0%} "
            "by prompt. Give more data, or an evaluation source of its own."
        )
    chosen = set(held_out)
    train = [comparison for index, comparison in enumerate(comparisons) if index not in chosen]
    return train, [comparisons[index] for index in sorted(chosen)]


def describe_split(train: Sequence[Comparison], held_out: Sequence[Comparison]) -> str:
    """One sentence: what was held out by what, and the share of its prompts that are in training, too."""
    known = {key for comparison in train for key in _prompts(comparison)}
    keys = {key for comparison in held_out for key in _prompts(comparison)}
    seen = len(keys & known)
    by = _kind(held_out)
    return (
        f"{len(held_out)} comparisons held out of {len(train) + len(held_out)}, by {by}; {seen} of their {len(keys)} "
        f"prompts ({seen / max(1, len(keys)):.1%}) are in training, too"
    )


def _kind(comparisons: Sequence[Comparison]) -> str:
    grouped = sum(bool(comparison.group) for comparison in comparisons)
    if grouped:
        return "group" if grouped == len(comparisons) else "group (by prompt where it is empty)"
    if all(comparison.prompt for comparison in comparisons):
        return "prompt (without such a column: by what both texts begin with)"
    begins = [bool(comparison.prompt or shared_beginning(comparison.completions)) for comparison in comparisons]
    return "the beginning that both texts share" if any(begins) else "completion (there are no prompts)"


def _prompts(comparison: Comparison) -> list[str]:
    """What stands for the prompt of a comparison: the prompt, the shared beginning, or each completion."""
    if isinstance(comparison.prompt, str) and comparison.prompt.strip():
        return [" ".join(comparison.prompt.split())]
    if comparison.prompt:
        return [comparison.prompt_key()]
    beginning = shared_beginning(comparison.completions)
    return [_BEGINNING + beginning] if beginning else [json.dumps(text) for text in comparison.completions]


def _linked_groups(comparisons: Sequence[Comparison]) -> list[list[int]]:
    """Group the indices of comparisons that have the same group or prompt, or are linked by a completion."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = []
    for comparison in comparisons:
        names = [f"group {comparison.group}"] if comparison.group else _prompts(comparison)
        for name in names[1:]:
            parent[root(name)] = root(names[0])
        keys.append(names[0])
    above: list[str] = []
    for key in sorted(set(keys)):  # a beginning that goes on where another ends may be of the same prompt
        while above and not (key.startswith(_BEGINNING) and key.startswith(above[-1])):
            above.pop()
        if above:
            parent[root(key)] = root(above[-1])
        above.append(key)
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(root(key), []).append(index)
    return list(groups.values())
