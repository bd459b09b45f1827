"""The limits of the house: few loose modules, no circles, short files and functions, a page that tells the truth."""

import re
import sys
from pathlib import Path

import pytest

from tests.structure.counts import ROOT, import_graph, in_circles, long_functions, loose_modules, modules, room_graph
from tests.structure.picture import PICTURE, picture

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = [ROOT / "rlhf_ppo", ROOT / "reward_model"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_at_most_six_modules_stand_loose_at_the_top(package: Path) -> None:
    assert len(loose_modules(package)) <= 6


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
    packages |= {f"reward_model/{path.parent.name}" for path in (ROOT / "reward_model").glob("*/__init__.py")}
    elsewhere = {"checkpoints": "robustness", "reward_model/utils": "utils"}
    assert [name for name in sorted(packages) if not (ROOT / "tests" / elsewhere.get(name, name)).is_dir()] == []


def test_a_circle_is_found_and_its_members_named() -> None:
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


@pytest.mark.parametrize(("package", "ordered"), [("rlhf_ppo", 17), ("reward_model", 4)])
def test_the_architecture_page_lists_the_packages_in_the_order_of_the_layers(package: str, ordered: int) -> None:
    contracts = SETTINGS["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one.get("containers") == [package]]
    order = [name.strip() for layer in reversed(layers) for name in layer.split("|")]
    parts = PAGE.read_text(encoding="utf-8").split("## One prompt")[0].split("`reward_model/` trains")
    rows = [line.split("|")[1] for line in parts[PACKAGES.index(ROOT / package)].splitlines() if line.startswith("| `")]
    listed = [name.removesuffix("/").removesuffix(".py") for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    assert listed[:ordered] == order[:ordered]
    assert sorted(listed) == sorted(order)


def test_the_picture_of_the_rooms_is_drawn_from_the_imports() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "draw it again: python -m tests.structure.picture"


def test_every_place_that_the_architecture_page_names_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    places = re.findall(r"^\| \d+ \| `([\w/]+\.py)` `([\w.]+)`", page, re.MULTILINE)
    assert len(places) == 12
    for file, name in places:
        path = ROOT / file if file.startswith("recipes") else ROOT / "rlhf_ppo" / file
        text = path.read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"(class|def) {part}\b", text), f"{file} does not define {part}"
