"""Token traces: a few training responses token by token, for the token view of the report."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.batch import TokenInputs, TrainBatch
from rlhf_ppo.chat.encoding import decode_tokens
from rlhf_ppo.loop.run_folder import TokenTrace
from rlhf_ppo.rollout.experience import ScoredResponses

_INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def token_traces(
    batch: TrainBatch,
    scored: ScoredResponses,
    tokenizer: PreTrainedTokenizerBase,
    *,
    iteration: int,
    scores: Sequence[float],
    count: int = 6,
) -> list[TokenTrace]:
    """Token traces of the first `count` responses of a batch, not of selected ones.

    Args:
        batch: Batch of the update; its inputs are tokens.
        scored: Scores of the same rows under policy and reference.
    """
    inputs = batch.inputs
    if not isinstance(inputs, TokenInputs):
        raise TypeError(f"a token trace needs a batch of tokens, got {type(inputs).__name__}")
    traces = []
    for row, response in enumerate(inputs.responses[:count]):
        numbers = {"logprobs": batch.logprobs, "kl": scored.kl, "values": batch.values, "advantages": batch.advantages}
        traces.append(
            TokenTrace(
                iteration=iteration,
                prompt=decode_tokens(tokenizer, inputs.prompts[row].tolist(), skip_special_tokens=True),
                score=scores[row],
                tokens=token_texts(tokenizer, response),
                own=[] if bool(batch.mask[row, : len(response)].all()) else batch.mask[row, : len(response)].tolist(),
                **{name: values[row, : len(response)].tolist() for name, values in numbers.items()},
            )
        )
    return traces


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """The text that each token adds to the decoded response; joined, they are the response.

    A character of several tokens is in the text of the last one.
    """
    texts, decoded = [], ""
    for end in range(1, len(ids) + 1):
        text = decode_tokens(tokenizer, ids[:end].tolist(), clean_up_tokenization_spaces=False)
        if end < len(ids):
            text = text.rstrip(_INCOMPLETE_CHARACTER)
        texts.append(text[len(decoded) :])
        decoded = text
    return texts
