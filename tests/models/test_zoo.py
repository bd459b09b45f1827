"""Every architecture of the installed transformers scores, generates, learns and loads exactly, or is refused."""

import pytest
import transformers

from tests.models.zoo import architectures, examine, row, table_of_page

pytestmark = pytest.mark.filterwarnings("ignore")  # third parties' own, by architecture

SLICE = (
    "llama", "gpt2", "granite", "gemma2", "falcon_h1", "bert", "roberta", "mamba", "gemma3", "xlm", "olmo",
    "reformer", "gemma3n_text", "seq2seq/t5", "seq2seq/bart", "vision/llava",
)  # fmt: skip
"""One of each kind: plain, scaled, capped, hybrid, layers before the head, other positions, a recurrent state, nested,
refused, changed in place, states longer than the row, states that are no row a token, encoder-decoders."""
WRITTEN_WITH = "5.23.0"
"""Version of transformers that the table was written with."""


@pytest.mark.parametrize("name", SLICE)
def test_an_architecture_of_each_kind_is_right(name: str) -> None:
    verdict = examine(name)
    assert verdict.is_right, verdict
    if transformers.__version__ == WRITTEN_WITH:
        assert row(verdict) in table_of_page()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architectures() if name not in SLICE])
def test_every_architecture_is_right(name: str) -> None:
    verdict = examine(name)
    assert verdict.is_right, verdict
    if transformers.__version__ == WRITTEN_WITH:
        assert row(verdict) in table_of_page()


def test_the_table_has_a_row_for_every_architecture_and_none_is_wrong() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table_of_page()]
    assert all(len(line) == 3 for line in cells)
    if transformers.__version__ == WRITTEN_WITH:
        assert [line[0] for line in cells] == architectures()
    assert all(line[1].startswith(("exact", "refused", "not built")) for line in cells)
