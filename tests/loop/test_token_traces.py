"""Token traces: the text of each token, and the numbers that the update saw."""

import pytest
import torch

from rlhf_ppo.batch import TokenInputs, TrainBatch
from rlhf_ppo.loop.token_traces import token_texts, token_traces
from rlhf_ppo.rollout.experience import ScoredResponses
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_tokenizer


@pytest.mark.parametrize("text", ["The movie was good.", " naïve café 東京 🙂", "a\n\nb"])
def test_token_texts_join_to_the_decoded_response(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(text).input_ids)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in texts)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer("a東").input_ids[:-1])
    assert token_texts(tokenizer, ids)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_traces_hold_each_rows_own_numbers_and_no_padding() -> None:
    """Rows of three and one tokens; the shorter one ends with a stop token, which is shown."""
    tokenizer = tiny_tokenizer()
    first = torch.tensor(tokenizer(" good").input_ids)
    responses = [first, torch.tensor([EOS_TOKEN_ID])]
    width = len(first)
    numbers = torch.arange(2.0 * width).reshape(2, width)
    mask = torch.tensor([[True] * width, [True] + [False] * (width - 1)])
    prompts = [torch.tensor(tokenizer(text).input_ids) for text in ("A", "B")]
    inputs = TokenInputs(prompts=prompts, responses=responses)
    batch = TrainBatch(
        inputs=inputs, mask=mask, logprobs=-numbers, values=numbers, advantages=numbers / 2, returns=numbers
    )
    scored = ScoredResponses(logprobs=-numbers, values=torch.zeros(2, width + 1), ref_logprobs=numbers, kl=numbers * 3)
    traces = token_traces(batch, scored, tokenizer, iteration=4, scores=[1.0, 2.0])
    assert [(trace.iteration, trace.prompt, trace.score) for trace in traces] == [(4, "A", 1.0), (4, "B", 2.0)]
    assert "".join(traces[0].tokens) == " good" and traces[0].kl == [3.0 * i for i in range(width)]
    assert traces[1].tokens == ["<eos>"] and traces[1].advantages == [width / 2] and traces[1].values == [float(width)]
    assert len(token_traces(batch, scored, tokenizer, iteration=4, scores=[1.0, 2.0], count=1)) == 1
