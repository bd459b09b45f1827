"""What the README and the documentation show, runs: examples that rot are worse than none."""

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, python_blocks
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

LOOK_ALIKES = ("gpt2", "Qwen/Qwen2.5-0.5B-Instruct")
"""Names in the pages; a folder of that name stands in for the hub."""

WITH_CODE = [page for page in PAGES if python_blocks(page.read_text())]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer under each name."""
    folder = tmp_path_factory.mktemp("models")
    for name in LOOK_ALIKES:
        tiny_gpt2().save_pretrained(folder / name)
        tiny_tokenizer(chat=True).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_blocks_of_a_page_run_one_after_the_other(
    page: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one namespace, so that a later block may use what an earlier one made. Line numbers are those of the page."""
    monkeypatch.chdir(models)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(page.read_text()):
        if not block.skipped:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


def test_a_block_is_left_out_only_with_a_reason() -> None:
    page = "<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\ntext\n```python\nx = 1\n```\n```sh\nls\n```\n"
    assert [(block.line, block.skipped) for block in python_blocks(page)] == [(3, True), (7, False)]
