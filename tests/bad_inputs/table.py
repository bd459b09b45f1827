"""The table of bad inputs: `python -m tests.bad_inputs.table` writes docs/bad-inputs.md."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "bad-inputs.md"
HEAD = """# Bad inputs

What is said about a wrong argument, setting or file: what was expected, what came, what would follow, what to do.
Nothing has changed when a message of this table appears. The table is written by `python -m tests.bad_inputs.table`,
from the same calls that the tests make; {count} inputs.
"""


def page() -> str:
    """The whole page."""
    from tests.bad_inputs.cases import CASES

    lines = [HEAD.format(count=len(CASES))]
    for area in dict.fromkeys(case.area for case in CASES):
        lines += [f"## {area}", "", "| Input | Message |", "|---|---|"]
        lines += [f"| {case.name} | {_cell(case.message())} |" for case in CASES if case.area == area]
        lines.append("")
    return "\n".join(lines)


def _cell(message: str) -> str:
    text = " ".join(message.split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
