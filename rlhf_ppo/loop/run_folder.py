"""`RunFolder`: the files that training writes, and that the report and a resumed run read.

    config.json       the resolved settings
    metrics.jsonl     one flat object of numbers per iteration, with the key "iteration"
    evaluation.json   {"before": {metric: {"mean", "stderr"}}, "after": {...}}
    samples.jsonl     held-out prompts with the responses before and after training
    tokens.jsonl      a few responses token by token

Whole files are written under a temporary name and renamed: a reader never sees half a file. Lines are appended and
flushed: a crash can only damage the last line, which readers skip and `resume_from` removes.
"""

import json
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from rlhf_ppo.utils.files import rename_aside
from rlhf_ppo.utils.redaction import redacted

Estimates: TypeAlias = dict[str, tuple[float, float]]
"""Name of a metric -> its mean and the standard error of the mean."""

CONFIG, METRICS, EVALUATION = "config.json", "metrics.jsonl", "evaluation.json"
SAMPLES, TOKENS = "samples.jsonl", "tokens.jsonl"


class RunFolderError(ValueError):
    """A run folder is missing, or a file of it is malformed; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out prompt with the responses of the policy before and after training."""

    prompt: str
    before: str
    after: str
    before_scores: Mapping[str, float] = field(default_factory=dict)
    """Name of a judge -> its score of the response before training."""
    after_scores: Mapping[str, float] = field(default_factory=dict)
    """Name of a judge -> its score of the response after training."""


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """One training response token by token, with the numbers of its update. All lists have one entry per token."""

    iteration: int
    prompt: str
    score: float
    tokens: list[str]
    """The text of each response token."""
    logprobs: list[float]
    """log π(token), in nats."""
    kl: list[float]
    """The KL term to the reference, in nats."""
    values: list[float]
    """V at each token: the return that the value head predicts."""
    advantages: list[float]
    """Advantage of each token, as used in the loss."""
    own: list[bool] = field(default_factory=list)
    """Whether the policy sampled each token; []: it sampled all."""

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("tokens", "logprobs", "kl", "values", "advantages")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"A TokenTrace needs one number per token, got lists of length {lengths}.")


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes the files of one run folder; it holds no state but the path."""

    path: Path

    @classmethod
    def create(cls, path: Path | str) -> "RunFolder":
        """The run folder at `path`, made when missing."""
        folder = cls(Path(path))
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """The run folder at `path`; a RunFolderError if there is none."""
        if not Path(path).is_dir():
            raise RunFolderError(f"There is no run folder {str(path)!r}. Give the folder that training wrote into.")
        return cls(Path(path))

    def check_writable(self) -> None:
        """Check that a file can be written into the folder; raise OSError, which names the folder, if not."""
        try:
            self.write_bytes(".writable", b"")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise OSError(
                f"cannot write into the run folder {self.path} ({error.strerror or error}): metrics and checkpoints "
                "would be lost. Choose another output_dir."
            ) from error

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved settings, without secrets; values that JSON does not know are written as text."""
        self._replace(CONFIG, _json(redacted(config), indent=2) + "\n")

    def append_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one iteration; nan and infinity are written as null."""
        self._append(METRICS, {"iteration": iteration, **{name: float(value) for name, value in metrics.items()}})

    def append_tokens(self, traces: Iterable[TokenTrace]) -> None:
        """Append responses for the token view of the report."""
        for trace in traces:
            self._append(TOKENS, asdict(trace))

    def write_samples(self, samples: Iterable[Sample]) -> None:
        """Write all held-out samples, of which the report shows some."""
        self._replace(SAMPLES, "".join(_json(asdict(sample)) + "\n" for sample in samples))

    def write_evaluation(self, *, before: Estimates, after: Estimates) -> None:
        """Write the held-out evaluations before and after training."""
        both = {"before": before, "after": after}
        content = {
            when: {name: {"mean": mean, "stderr": stderr} for name, (mean, stderr) in estimates.items()}
            for when, estimates in both.items()
        }
        self._replace(EVALUATION, _json(content, indent=2) + "\n")

    def resume_from(self, iteration: int) -> None:
        """Remove the lines of later iterations, and a line damaged by a crash.

        A run resumed from the checkpoint of iteration n writes n + 1 again, whose lines would otherwise be there twice.
        """
        for name in (METRICS, TOKENS):
            if (self.path / name).exists():
                remaining = (row for row in self._lines(name) if _iteration(row) <= iteration)
                self._replace(name, "".join(_json(row) + "\n" for row in remaining))

    def set_records_aside(self) -> None:
        """Rename metrics.jsonl and tokens.jsonl, where they are, to metrics.1.jsonl and so on."""
        for path in (self.path / METRICS, self.path / TOKENS):
            if path.exists():
                rename_aside(path)

    def config(self) -> dict[str, Any]:
        """The settings; empty if none were written."""
        return self._read_object(CONFIG)

    def metrics(self, unreadable: Counter[str] | None = None) -> list[dict[str, float]]:
        """Metrics of each iteration, in order; the later row if there are two. null is read as nan."""
        rows = self._lines(METRICS, unreadable)
        latest = {_iteration(row): _floats(row) for row in rows if "iteration" in row}
        return [latest[iteration] for iteration in sorted(latest)]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Iterations and values of one metric, without iterations where it is missing or not finite."""
        points = [(row["iteration"], row[name]) for row in self.metrics() if math.isfinite(row.get(name, math.nan))]
        return [iteration for iteration, _ in points], [value for _, value in points]

    def samples(self, unreadable: Counter[str] | None = None) -> list[Sample]:
        """The held-out samples; empty if none were written."""
        scores = ("before_scores", "after_scores")
        rows = self._lines(SAMPLES, unreadable)
        return [_build(Sample, row | {key: _floats(row.get(key) or {}) for key in scores}, SAMPLES) for row in rows]

    def tokens(self, unreadable: Counter[str] | None = None) -> list[TokenTrace]:
        """The responses of the token view; empty if none were written."""
        numbers = ("logprobs", "kl", "values", "advantages")
        return [
            _build(TokenTrace, row | {key: [_number(x) for x in row.get(key, [])] for key in numbers}, TOKENS)
            for row in self._lines(TOKENS, unreadable)
        ]

    def evaluation(self) -> dict[str, Estimates]:
        """Mean and standard error of each metric under "before" and "after"; either may be missing."""
        content = self._read_object(EVALUATION)
        try:
            return {
                when: {name: (_number(item["mean"]), _number(item.get("stderr"))) for name, item in dict(rows).items()}
                for when, rows in content.items()
            }
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RunFolderError(
                f'{EVALUATION} must read {{"before": {{metric: {{"mean": .., "stderr": ..}}}}, "after": ..}}; '
                "it does not. Write it with RunFolder.write_evaluation."
            ) from error

    def unreadable_lines(self) -> dict[str, int]:
        """Number of unreadable lines per file; files without any are left out."""
        counts: Counter[str] = Counter()
        for name in (METRICS, SAMPLES, TOKENS):
            deque(self._lines(name, counts), maxlen=0)
        return dict(counts)

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file into the folder, atomically; return its path."""
        return self._replace(name, text)

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write a file into the folder, atomically; return its path."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def _replace(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode("utf-8", errors="replace"))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.path / name).open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")  # end a line that a crash has cut short
            file.write(_json(row).encode("utf-8", errors="replace") + b"\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint of this iteration must not outlive its line

    def _lines(self, name: str, unreadable: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the objects of a JSON-lines file, one at a time; count other lines in `unreadable[name]`."""
        with suppress(FileNotFoundError), (self.path / name).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    yield row
                elif line.strip() and unreadable is not None:
                    unreadable[name] += 1

    def _read_object(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunFolderError(f"{name} is no JSON: {error}. Restore it, or delete it to go on.") from error
        if not isinstance(content, dict):
            raise RunFolderError(f"{name} must hold a JSON object, it holds a {type(content).__name__}.")
        return content


def _json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(_to_json_types(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _to_json_types(value: Any) -> Any:
    """Convert a value to JSON types: nan and infinity to None, unknown types to text."""
    if isinstance(value, Mapping):
        return {str(key): _to_json_types(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_to_json_types(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def _floats(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row; rows share the texts of their names, which take more memory than the numbers."""
    numbers = ((name, value) for name, value in row.items() if value is None or isinstance(value, int | float))
    return {sys.intern(name): _number(value) for name, value in numbers}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _iteration(row: Mapping[str, Any]) -> int:
    """The iteration of a row; -1 if it has none."""
    iteration = row.get("iteration")
    return int(iteration) if isinstance(iteration, int | float) else -1


def _build(kind: type[Any], row: Mapping[str, Any], name: str) -> Any:
    """A dataclass from a row of the file `name`; unknown keys are ignored."""
    known = {f.name for f in fields(kind)}
    missing = [
        f.name for f in fields(kind) if f.name not in row and f.default_factory is MISSING and f.default is MISSING
    ]
    if missing:
        raise RunFolderError(f"A line of {name} lacks {', '.join(map(repr, missing))}: it is no {kind.__name__}.")
    try:
        return kind(**{key: value for key, value in row.items() if key in known})
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"A line of {name} is no {kind.__name__}: {error}") from error
