"""`DataOptions` and `ModelOptions`: flags that several commands share; without torch, for a quick help."""

from dataclasses import dataclass, field
from typing import Literal

from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data that a command reads."""

    data: list[str]
    """Files (.jsonl, .json, .csv, .tsv, .parquet), folders, or hub names; also .gz, .zst, .bz2, .xz."""
    split: str = "train"
    """Which split of a folder or hub dataset to read."""
    columns: list[str] = field(default_factory=list)
    """Names of columns, ours=theirs, such as chosen=better; `preference=` leaves one out."""
    encoding: str | None = None
    """Encoding of text files, such as cp1252; None: UTF-8, or what a byte order mark says."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """At a row that cannot be read: stop, or set it aside."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The reward model that a command loads."""

    model: str
    """Folder or hub name of a reward model; may stand first, without the flag."""
    label: str | None = None
    """Label whose logit is the score, for a classifier with several; its name or index."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""

    def __post_init__(self) -> None:
        check_fields(self)
