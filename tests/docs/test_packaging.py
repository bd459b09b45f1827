"""pyproject.toml and the constraints files say what the code needs, and nothing of the machine they were made on."""

import ast
import itertools
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.docs.pages import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = {
    name: [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
    for name in ("constraints.txt", "constraints-lowest.txt", "constraints-newest.txt")
}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Import names that differ from their distribution."""
OWN = {"rlhf_ppo", "reward_model", "recipes", "tests"} | {path.stem for path in (ROOT / "recipes").iterdir()}


def ranges(*extras: str) -> list[Requirement]:
    """The requirements of the package with these extras, as far as this Python needs them."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    found = [Requirement(line) for lines in lists for line in lines]
    return [item for item in found if item.marker is None or item.marker.evaluate()]


def pins(name: str) -> dict[str, Version]:
    """The versions of a constraints file, by normalized name."""
    found = [Requirement(line) for line in CONSTRAINTS[name]]
    return {canonicalize_name(item.name): Version(next(iter(item.specifier)).version) for item in found}


def requirements(*extras: str) -> set[str]:
    """Normalized names of the distributions that the package asks for, with these extras."""
    return {canonicalize_name(item.name) for item in ranges(*extras)}


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
        ("reward_model", ("demo", "serve", "wandb")),
        ("recipes", ("demo", "serve", "deepspeed", "control")),
        ("tests", ("demo", "serve", "deepspeed", "control", "control-peers", "test", "triton")),
    ],
)
def test_every_third_party_import_is_a_declared_dependency(folder: str, extras: tuple[str, ...]) -> None:
    undeclared = imported(ROOT / folder) - requirements(*extras)
    assert not undeclared, f"add to pyproject.toml: {sorted(undeclared)}"


def test_every_requirement_of_the_environment_is_in_the_tested_set() -> None:
    """What `make install` installs is pinned, so that the second machine gets what the first one tested."""
    missing = requirements("control", "demo", "docs", "lint", "serve", "test") - set(pins("constraints.txt"))
    assert not missing, f"add to constraints.txt: {sorted(missing)}"


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_versions_of_a_constraints_file_are_inside_the_declared_ranges(name: str) -> None:
    for requirement in ranges("demo", "serve", "test"):
        pin = pins(name)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} does not admit the {pin} of {name}"


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    """What `make test-lowest` installs is what pyproject.toml promises; torch alone stays at the Makefile's version."""
    lowest = pins("constraints-lowest.txt")
    for requirement in ranges("demo", "serve", "test"):
        (bound,) = [item.version for item in requirement.specifier if item.operator == ">="]
        pin = lowest[canonicalize_name(requirement.name)]
        assert pin == Version(bound) or requirement.name == "torch", f"{requirement} was tested with {pin}"


def test_every_set_has_the_torch_that_the_makefile_installs_first() -> None:
    torch = re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert torch is not None
    assert {str(pins(name)["torch"]) for name in CONSTRAINTS} == {torch[1]}


def test_the_constraints_name_versions_and_nothing_of_a_machine() -> None:
    for line in itertools.chain.from_iterable(CONSTRAINTS.values()):
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ; python(_full)?_version >= \"3(\.\d+)+\")?", line), (
            f"{line}: no hosts, no local versions"
        )
