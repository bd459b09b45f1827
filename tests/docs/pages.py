"""The pages of the documentation, as the tests read them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))

_FENCE = re.compile(
    r"^(?P<fence>```+)(?P<language>\w*)( title=\"(?P<title>[^\"]*)\")?[^\n]*\n(?P<text>.*?)^(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*\Z")


@dataclass(frozen=True)
class CodeBlock:
    """One fenced ```python block."""

    line: int
    text: str
    skipped: bool
    """Whether the line before says `<!-- not run: reason -->`."""


@dataclass(frozen=True)
class Block:
    """Any fenced block."""

    language: str
    title: str
    """Of ` ```python title="file.py"`: the file that a reader saves it as; "": none."""
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(match["language"], match["title"] or "", match["text"]) for match in _FENCE.finditer(page)]


def python_blocks(page: str) -> list[CodeBlock]:
    """The ```python blocks of a page, in order; not those that a reader saves as files."""
    return [
        CodeBlock(
            line=page.count("\n", 0, match.start("text")) + 1,
            text=match["text"],
            skipped=_NOT_RUN.search(page[: match.start()]) is not None,
        )
        for match in _FENCE.finditer(page)
        if match["language"] == "python" and not match["title"]
    ]


def without_code(page: str) -> str:
    """The page without its fenced blocks and inline code, where brackets mean something else."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page))


def links(page: str) -> Iterator[str]:
    """Targets of Markdown links and images that stay inside the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: str) -> set[str]:
    """The ids of a page's headings, as Python-Markdown and GitHub form them for plain headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def documented(package: str) -> set[str]:
    """Names of `package` that the API pages show: `::: package` followed by `members: [...]`, or `::: package.name`."""
    names: set[str] = set()
    for page in API_PAGES:
        text = page.read_text()
        for block in re.findall(rf"^::: {re.escape(package)}\n((?:    .*\n?)*)", text, re.MULTILINE):
            for members in re.findall(r"members: \[([^\]]*)\]", block):
                names |= {name.strip() for name in members.split(",")}
        names |= set(re.findall(rf"^::: {re.escape(package)}\.(\w+)$", text, re.MULTILINE))
    return names


def commands(page: str) -> Iterator[str]:
    """The shell commands of a page: lines of fenced blocks without a language, and inline code, that begin as one."""
    blocks = [match["text"] for match in _FENCE.finditer(page) if match["language"] in ("", "sh", "bash", "shell")]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", _FENCE.sub("", page))
    starts = re.compile(r"([A-Z_]+=\S+ )*(rlhf-ppo|make|python|accelerate launch|tests/\S+\.sh|\.ci/run)( |$)")
    for text in [*lines, *inline]:
        if starts.match(text) and "..." not in text.split(" ")[1:2] and "COMMAND" not in text:
            yield text
