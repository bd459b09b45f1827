"""Draw the rooms of `rlhf_ppo` and the imports between them: `python -m tests.structure.picture` writes the SVG.

An import that follows from others (a imports b, b imports c, so a may import c) is left out: what remains is read as
"stands on".
"""

from tests.structure.counts import ROOT, room_graph

PICTURE = ROOT / "docs" / "assets" / "rooms.svg"
WIDTH, ROW, BOX, HEIGHT = 880, 62, 118, 34
STYLE = (
    "text{font:14px system-ui,sans-serif;text-anchor:middle;fill:#1c2430}rect{fill:#fff;stroke:#2f62c8;rx:7}"
    "path{fill:none;stroke:#8a94a6;stroke-width:1.2;marker-end:url(#arrow)}.page{fill:#f5f6f9;stroke:none}"
)


def rooms() -> dict[str, set[str]]:
    """Room -> the rooms that it stands on, without those that follow from others."""
    graph = {_short(name): {_short(target) for target in targets} for name, targets in _graph().items()}
    return {name: {one for one in below if one not in _reached(graph, below - {one})} for name, below in graph.items()}


def _graph() -> dict[str, set[str]]:
    return {name: targets for name, targets in room_graph(ROOT / "rlhf_ppo").items() if not name.endswith("__main__")}


def _short(room: str) -> str:
    return room.split(".")[1]


def _reached(graph: dict[str, set[str]], ahead: set[str]) -> set[str]:
    found: set[str] = set()
    while ahead:
        found |= ahead
        ahead = {target for name in ahead for target in graph.get(name, ())} - found
    return found


def places(graph: dict[str, set[str]]) -> dict[str, tuple[float, int]]:
    """Room -> its place in its row, and its row: 0 at the top, each room below all that stand on it."""
    row: dict[str, int] = {}
    names = sorted(graph.keys() | set().union(*graph.values()))
    above = {name: [one for one in names if name in graph.get(one, ())] for name in names}

    def row_of(name: str) -> int:
        if name not in row:
            row[name] = 1 + max((row_of(one) for one in above[name]), default=-1)
        return row[name]

    found: dict[str, tuple[float, int]] = {}
    for number in range(1 + max(map(row_of, names))):
        here = [name for name in names if row[name] == number]
        here.sort(key=lambda name: sum(found[one][0] for one in above[name]) / max(1, len(above[name])))
        for index, name in enumerate(here):
            found[name] = (WIDTH * (index + 1) / (len(here) + 1), number)
    return found


def picture() -> str:
    """The SVG."""
    graph = rooms()
    where = places(graph)
    height = ROW * (2 + max(row for _, row in where.values()))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title">',
        '<title id="title">The packages of rlhf_ppo: each stands on those that its arrows lead to</title>',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        f'<path d="M0 0 8 4 0 8z" style="fill:#8a94a6;stroke:none"/></marker><style>{STYLE}</style></defs>',
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
    ]
    for name in sorted(graph):
        for target in sorted(graph[name]):
            (x, row), (to_x, to_row) = where[name], where[target]
            y, to_y = ROW * (row + 1) + HEIGHT / 2, ROW * (to_row + 1) - HEIGHT / 2
            middle = (y + to_y) / 2
            lines.append(
                f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"/>'
            )
    for name in sorted(where):
        x, y = where[name][0], ROW * (where[name][1] + 1)
        lines.append(
            f'<rect x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{BOX}" height="{HEIGHT}"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}">{name}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
