"""No file of preference data ends in a traceback or a hang, and every row is counted as read, skipped or refused."""

import jaxtyping
import pytest
from datasets import disable_progress_bars

from tests.fuzz.reader_cases import run


@pytest.mark.parametrize("rows", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_every_fuzzed_row_is_read_skipped_or_refused(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user runs without type checks
    disable_progress_bars()
    counts = run(rows, seed=rows)
    print(dict(counts))
    ends = ("read", "undecided", "skipped", "refused with the file", "gone with damaged bytes")
    assert sum(counts[name] for name in ends) == counts["rows"] == rows
    assert (
        min(counts[name] for name in ("read", "skipped", "refused with the file", "comparisons", "prompts"))
        > rows / 100
    )
