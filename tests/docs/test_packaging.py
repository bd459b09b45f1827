"""pyproject.toml and constraints.txt say what the code needs, and nothing of the machine they were made on."""

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docs.pages import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Import names that differ from their distribution."""
OWN = {"rlhf_ppo", "reward_model", "recipes", "tests"} | {path.stem for path in (ROOT / "recipes").iterdir()}


def requirements(*extras: str) -> set[str]:
    """Normalized names of the distributions that the package asks for, with these extras."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    found = [Requirement(line) for lines in lists for line in lines]
    return {canonicalize_name(item.name) for item in found if item.marker is None or item.marker.evaluate()}


def imported(folder: Path) -> set[str]:
    """Third-party top-level names that a folder's modules import, anywhere in them."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    local = {path.stem for path in folder.glob("*.py")}
    foreign = names - set(sys.stdlib_module_names) - OWN - local
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in foreign}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("rlhf_ppo", ("demo", "deepspeed", "control", "wandb")),
        ("reward_model", ("demo", "serve")),
        ("recipes", ("demo", "serve", "deepspeed", "control")),
        ("tests", ("demo", "serve", "deepspeed", "control", "control-peers", "test")),
    ],
)
def test_every_third_party_import_is_a_declared_dependency(folder: str, extras: tuple[str, ...]) -> None:
    undeclared = imported(ROOT / folder) - requirements(*extras)
    assert not undeclared, f"add to pyproject.toml: {sorted(undeclared)}"


def test_every_requirement_of_the_environment_is_in_the_tested_set() -> None:
    """What `make install` installs is pinned, so that the second machine gets what the first one tested."""
    pinned = {canonicalize_name(Requirement(line).name) for line in CONSTRAINTS}
    missing = requirements("control", "demo", "docs", "lint", "serve", "test") - pinned
    assert not missing, f"add to constraints.txt: {sorted(missing)}"


def test_the_tested_set_is_inside_the_declared_ranges() -> None:
    pins = {canonicalize_name(Requirement(line).name): re.search(r"==([^\s;]+)", line) for line in CONSTRAINTS}
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        pin = pins[canonicalize_name(requirement.name)]
        assert pin is not None
        assert requirement.specifier.contains(pin[1]), f"{line} does not admit the tested {pin[1]}"


def test_the_constraints_name_versions_and_nothing_of_a_machine() -> None:
    for line in CONSTRAINTS:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; python(_full)?_version >= \"3(\.\d+)+\")?", line), (
            f"{line}: no hosts, no local versions"
        )
