"""The documentation keeps its promises: links lead somewhere, public names are there."""

import importlib
import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, documented, links

_TEST = re.compile(r"^def (test_\w+)", re.MULTILINE)
PACKAGES = [
    "rlhf_ppo",
    "rlhf_ppo.functional",
    "rlhf_ppo.models",
    "rlhf_ppo.algorithms",
    "rlhf_ppo.checkpoints",
    "rlhf_ppo.control",
    "rlhf_ppo.report",
    "reward_model",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page.read_text()):
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{link}: there is no such file"
        if anchor:
            found = anchors(target.read_text())
            assert anchor in found, f"{link}: the headings of that page are {sorted(found)}"


def test_the_readme_is_130_lines_of_100_columns_at_most() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_api_pages(package: str) -> None:
    """A name that a page of a subpackage documents counts for its parent, which re-exports it."""
    module = importlib.import_module(package)
    everywhere = set().union(*(documented(name) for name in (package, *_sources(module))))
    missing = {name for name in module.__all__ if not name.startswith("__")} - everywhere
    assert not missing, f"add to docs/api: {sorted(missing)}"


def _sources(module: object) -> set[str]:
    """Modules that a package re-exports from, and their parents."""
    homes = {str(getattr(getattr(module, name), "__module__", "")) for name in module.__all__}  # type: ignore[attr-defined]
    return homes | {home.rpartition(".")[0] for home in homes if "." in home}


def test_every_test_that_a_page_names_exists() -> None:
    """The tables of faults, promises and defects are lists of tests; a name that is gone would be an empty claim."""
    known = {name for path in (ROOT / "tests").rglob("test_*.py") for name in _TEST.findall(path.read_text())}
    for page in PAGES:
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert not named - known, f"{page.name} names tests that do not exist: {sorted(named - known)}"


def test_every_defect_that_has_a_test_is_on_the_page_of_defects() -> None:
    page = (ROOT / "docs" / "migrating-from-trl.md").read_text()
    for file in ("test_classic_defects.py", "test_v2_and_trlx_defects.py"):
        names = _TEST.findall((ROOT / "tests" / "classic" / file).read_text())
        missing = [name for name in names if f"`{name}`" not in page]
        assert not missing, f"{file}: {missing}"
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == list(range(1, 14))
