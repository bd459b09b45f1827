"""Count the rooms of a package: modules, imports between them, and circles.

    python -m tests.structure.counts [PACKAGE_FOLDER]

Imports for a type alone (`if TYPE_CHECKING`) count as imports: they, too, tie two modules together.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name of every module -> its file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules among `known` that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from (name for name in (full if full in known else node.module,) if name in known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def room(module: str) -> str:
    """The package or loose module directly below the top that a module belongs to."""
    return ".".join(module.split(".")[:2])


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports; without the package's own `__init__`."""
    known = {name: path for name, path in modules(package).items() if name != package.name}
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def room_graph(package: Path) -> dict[str, set[str]]:
    """Room -> other rooms that it imports."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module, targets in import_graph(package).items():
        graph[room(module)] |= {room(target) for target in targets} - {room(module)}
    return dict(graph)


def in_circles(graph: dict[str, set[str]]) -> list[str]:
    """The names that can be reached from themselves along the imports."""
    found = []
    for start in graph:
        reached, ahead = set(), set(graph[start])
        while ahead:
            reached |= ahead
            ahead = {target for name in ahead for target in graph.get(name, ())} - reached
        if start in reached:
            found.append(start)
    return sorted(found)


def loose_modules(package: Path) -> list[str]:
    """Files directly in the package folder, `__init__` and `__main__` left out."""
    return sorted(path.stem for path in package.glob("*.py") if not path.stem.startswith("__"))


def long_functions(package: Path, limit: int) -> list[str]:
    """Functions of more than `limit` lines of code; docstrings, comments and blank lines do not count."""
    found = []
    for path in modules(package).values():
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) is not None
                first = (node.body[0].end_lineno or 0) + 1 if docstring else node.body[0].lineno
                body = [line.strip() for line in lines[first - 1 : node.end_lineno]]
                if len([line for line in body if line and not line.startswith("#")]) > limit:
                    found.append(f"{path.name}:{node.lineno} {node.name}")
    return found


def counts(package: Path) -> dict[str, int]:
    """The figures of a package."""
    graph, rooms = import_graph(package), room_graph(package)
    paths = modules(package).values()
    return {
        "packages": len([path for path in package.iterdir() if (path / "__init__.py").exists()]),
        "loose modules": len(loose_modules(package)),
        "files": len(paths),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths),
        "imports between files": sum(map(len, graph.values())),
        "imports between rooms": sum(map(len, rooms.values())),
        "files in a circle of imports": len(in_circles(graph)),
        "rooms in a circle of imports": len(in_circles(rooms)),
    }


if __name__ == "__main__":
    for name, number in counts(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "rlhf_ppo")).items():
        print(f"{number:7,}  {name}")
