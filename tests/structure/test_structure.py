"""The limits of the house: few loose modules, no circles, short files and functions."""

from pathlib import Path

import pytest

from tests.structure.counts import ROOT, import_graph, in_circles, long_functions, loose_modules, modules, room_graph

PACKAGES = [ROOT / "rlhf_ppo", ROOT / "reward_model"]


def test_at_most_six_modules_stand_loose_at_the_top() -> None:
    assert len(loose_modules(ROOT / "rlhf_ppo")) <= 6


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_imports_run_in_a_circle(package: Path) -> None:
    assert in_circles(import_graph(package)) == []
    assert in_circles(room_graph(package)) == []


@pytest.mark.parametrize("package", [*PACKAGES, ROOT / "recipes"], ids=lambda path: path.name)
def test_files_and_functions_are_short(package: Path) -> None:
    assert [p.name for p in modules(package).values() if len(p.read_text(encoding="utf-8").splitlines()) > 300] == []
    assert long_functions(package, limit=40) == []


def test_no_test_file_is_loose_and_every_package_has_its_tests() -> None:
    assert [path.name for path in (ROOT / "tests").glob("test_*.py")] == []
    packages = {path.parent.name for path in (ROOT / "rlhf_ppo").glob("*/__init__.py")}
    elsewhere = {"checkpoints": "robustness"}
    assert [name for name in sorted(packages) if not (ROOT / "tests" / elsewhere.get(name, name)).is_dir()] == []


def test_a_circle_is_found_and_its_members_named() -> None:
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
