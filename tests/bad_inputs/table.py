"""The table of bad inputs: `python -m tests.bad_inputs.table` writes docs/bad-inputs.md."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "bad-inputs.md"
HEAD = """# Bad inputs

This page shows the error messages for {count} wrong arguments, settings and files. Each message says what is wrong.
Most messages also say what was expected, what was received, what would have gone wrong, and what to do. A wrong input
changes nothing: your model, files and trainer stay as they were. `python -m tests.bad_inputs.table` writes the tables
from the calls in the tests.
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
