"""Well-known preference sets in small: each is read by its command, and gives the comparisons that it stands for."""

import re
from pathlib import Path

import pytest

from reward_model import preview
from tests.docs.pages import ROOT
from tests.reward_model.data.tools_zoo import TOOLS_ZOO
from tests.reward_model.data.zoo import ZOO, PublicSet

ALL = [*ZOO, *TOOLS_ZOO]
PAGE = (ROOT / "docs" / "reward-models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("public", ALL, ids=[public.name for public in ALL])
def test_a_well_known_set_gives_the_comparisons_that_it_stands_for(
    public: PublicSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / public.file
    public.write(public.rows, path)
    loaded = preview.main(["--data", str(path), "--on_bad_row", "stop", *public.flags])
    assert [(c.prompt, c.completions, c.ranks) for c in loaded.comparisons] == public.expected
    assert loaded.report.undecided == public.undecided
    if public.sources:
        assert tuple(c.source for c in loaded.comparisons) == public.sources
    for comparison in loaded.comparisons:
        assert list(comparison.tools) == public.tools
    assert f"{len(public.expected)} comparisons from {len(public.rows)} rows" in capsys.readouterr().out


@pytest.mark.parametrize("public", ALL, ids=[public.name for public in ALL])
def test_the_page_lists_the_set_with_the_flags_that_read_it(public: PublicSet) -> None:
    (row,) = re.findall(rf"^\| {re.escape(public.name)} \|.*$", PAGE, re.MULTILINE)
    command = " ".join(["--data", public.file, *public.flags])
    assert f"`{command}`" in row


def test_a_soft_label_of_webgpt_is_half() -> None:
    (webgpt,) = [public for public in ZOO if public.name.startswith("WebGPT")]
    from reward_model.data.comparisons import parse_row

    assert [parse_row(row, "").preference for row in webgpt.rows] == [1.0, 0.5]
