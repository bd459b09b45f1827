"""Files that make room for others and are kept."""

from itertools import count
from pathlib import Path


def rename_aside(path: Path) -> Path:
    """Rename `metrics.jsonl` to `metrics.1.jsonl`, or to the first such name that is free; the new path."""
    asides = (path.with_suffix(f".{number}{path.suffix}") for number in count(1))
    return path.rename(next(aside for aside in asides if not aside.exists()))
