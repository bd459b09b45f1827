"""The tutorials, run as a reader runs them: their files, their commands, and the numbers that they promise."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from rlhf_ppo.cli import main
from tests.docs.pages import ROOT, blocks

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
NUMBER = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    runpy.run_path(str(ROOT / "docs" / "tutorials" / "toy.py"))["main"](str(folder))
    return folder


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of a page."""
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr(sys, "path", list(sys.path))
    if words[0] == "python":
        runpy.run_path(words[1], run_name="__main__")
        return
    assert words[0] == "rlhf-ppo"
    try:
        status = main([*words[1:], *(["--train.progress=false"] if words[1] == "ppo" else [])])
    except SystemExit as left:
        status = left.code
    assert not status


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_gives_the_numbers_that_it_promises(
    page: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 0.05 or 15 %: processors round differently, and a run follows its samples."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(toy)
    found = blocks(page.read_text())
    for block in found:
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    said = ""
    for block in found:
        if block.language == "sh":
            for line in block.text.splitlines():
                words = shlex.split(line, comments=True)
                if words[1:] != ["docs/tutorials/toy.py"]:
                    run(words, monkeypatch)
                    said += capsys.readouterr().out
        elif block.language == "text" and not block.title:
            pattern = f"({NUMBER.pattern})".join(map(re.escape, NUMBER.split(" ".join(block.text.split()))))
            match = re.search(pattern, " ".join(said.split()))
            assert match is not None, said
            promised = [float(number) for number in NUMBER.findall(block.text)]
            assert [float(number) for number in match.groups()] == pytest.approx(promised, rel=0.15, abs=0.05)
            said = ""


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_is_short_and_promises_a_number(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) <= 80
    assert any(NUMBER.search(block.text) for block in blocks(text) if block.language == "text" and not block.title)
