"""The run folder: nothing half-written, nothing twice after a resume, and damage that costs one line at most."""

import json
import math
import tracemalloc
from pathlib import Path

import pytest

from rlhf_ppo.report import RunFolder, RunFolderError, Sample, TokenTrace


def trace(iteration: int, text: str = "a") -> TokenTrace:
    numbers = {"logprobs": [-1.0], "kl": [0.1], "values": [0.2], "advantages": [0.3]}
    return TokenTrace(iteration=iteration, prompt="p", score=1.0, tokens=[text], **numbers)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "new" / "run")
    run.write_config({"model": "m", "nested": {"path": Path("x"), "tags": ("a", "b")}, "nothing": None})
    run.append_metrics(1, {"objective/kl": 0.5})
    run.append_metrics(2, {"objective/kl": 1.5})
    run.write_evaluation(before={"vader": (0.2, 0.01)}, after={"vader": (0.6, 0.02)})
    samples = [Sample(prompt="é\n", before="", after="ok", before_scores={"vader": 0.0}, after_scores={"vader": 1.0})]
    run.write_samples(samples)
    run.append_tokens([trace(1)])
    assert run.config() == {"model": "m", "nested": {"path": "x", "tags": ["a", "b"]}, "nothing": None}
    assert run.metrics() == [{"iteration": 1.0, "objective/kl": 0.5}, {"iteration": 2.0, "objective/kl": 1.5}]
    assert run.series("objective/kl") == ([1.0, 2.0], [0.5, 1.5])
    assert run.evaluation() == {"before": {"vader": (0.2, 0.01)}, "after": {"vader": (0.6, 0.02)}}
    assert run.samples() == samples
    assert run.tokens() == [trace(1)]


def test_an_empty_folder_reads_as_empty(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path)
    assert not any((run.config(), run.metrics(), run.evaluation(), run.samples(), run.tokens(), run.unreadable_lines()))


def test_files_are_strict_json_although_metrics_may_be_nan(tmp_path: Path) -> None:
    """`NaN` is no JSON: other readers would refuse the whole file."""
    run = RunFolder(tmp_path)
    run.append_metrics(1, {"a": math.nan, "b": math.inf, "c": 1.0})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"iteration": 1, "a": None, "b": None, "c": 1.0}
    assert math.isnan(run.metrics()[0]["a"])
    assert run.series("a") == ([], [])


def test_resuming_forgets_what_the_new_run_will_write_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for iteration in range(1, 6):
        run.append_metrics(iteration, {"x": float(iteration)})
        run.append_tokens([trace(iteration)])
    run.resume_from(3)
    run.append_metrics(4, {"x": 40.0})
    assert run.series("x") == ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 40.0])
    assert [found.iteration for found in run.tokens()] == [1, 2, 3]
    run.resume_from(0)
    assert run.metrics() == []


def test_half_a_line_from_a_crash_costs_that_line_only(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics(1, {"x": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "x"')
    assert run.series("x") == ([1.0], [1.0])
    run.append_metrics(3, {"x": 3.0})
    assert run.series("x") == ([1.0, 3.0], [1.0, 3.0])
    assert run.unreadable_lines() == {"metrics.jsonl": 1}
    run.resume_from(3)
    assert run.unreadable_lines() == {}


def test_of_an_iteration_written_twice_the_later_one_counts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for iteration, value in ((2, 1.0), (1, 2.0), (2, 3.0)):
        run.append_metrics(iteration, {"x": value})
    assert run.series("x") == ([1.0, 2.0], [2.0, 3.0])


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.write_config({"version": 1})

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        run.write_config({"version": 2})
    assert run.config() == {"version": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_text_that_utf8_cannot_hold_is_written_all_the_same(tmp_path: Path) -> None:
    """Byte-level tokenizers can decode to half a surrogate pair; a run must not die of it at its very end."""
    run = RunFolder(tmp_path)
    run.write_samples([Sample(prompt="a\ud83d", before="b", after="c")])
    assert run.samples()[0].prompt == "a?"


def test_files_with_other_contents_are_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "evaluation.json").write_text('{"before": [1]}')
    (tmp_path / "samples.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "tokens.jsonl").write_text(json.dumps({**vars(trace(1)), "kl": []}) + "\n")
    with pytest.raises(RunFolderError, match=r"config\.json is no JSON"):
        run.config()
    with pytest.raises(RunFolderError, match=r"evaluation\.json must read"):
        run.evaluation()
    with pytest.raises(RunFolderError, match=r"A line of samples\.jsonl lacks 'before', 'after'"):
        run.samples()
    with pytest.raises(RunFolderError, match=r"A line of tokens\.jsonl is no TokenTrace: .* one number per token"):
        run.tokens()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"config\.json must hold a JSON object, it holds a list"):
        run.config()


def test_opening_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="There is no run folder"):
        RunFolder.open(tmp_path / "nowhere")


def test_a_long_run_is_read_line_by_line(tmp_path: Path) -> None:
    """Beside the rows that are returned, no text and no second copy of them is in memory."""
    names = [f"objective/a_metric_with_a_long_name_{number}" for number in range(40)]
    lines = [json.dumps({"iteration": row, **dict.fromkeys(names, row + 0.5)}) for row in range(300)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = RunFolder.open(tmp_path)
    run.metrics()
    tracemalloc.start()
    try:
        rows = run.metrics()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 300
    assert peak < 1.5 * held  # the text alone would be as much again
    assert len({id(name) for row in rows for name in row}) == 41
