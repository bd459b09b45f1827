"""A few responses token by token, as the update saw them: what fills the token view of the report."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.batch import TokenInputs, TrainBatch
from rlhf_ppo.loop.run_folder import TokenTrace
from rlhf_ppo.rollout.experience import ScoredResponses

_PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def token_traces(
    batch: TrainBatch,
    scored: ScoredResponses,
    tokenizer: PreTrainedTokenizerBase,
    *,
    iteration: int,
    prompts: Sequence[str],
    scores: Sequence[float],
    count: int = 6,
) -> list[TokenTrace]:
    """The first `count` responses of a batch; they are not chosen.

    Args:
        batch: What the update learned from; its inputs are tokens.
        scored: The same rows under policy and reference.
        tokenizer: Turns token ids into text.
        iteration: That the batch belongs to.
        prompts: Text of each row's prompt.
        scores: What the reward sources gave each row.
        count: Most responses.
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
                prompt=prompts[row],
                score=scores[row],
                tokens=token_texts(tokenizer, response),
                **{name: values[row, : len(response)].tolist() for name, values in numbers.items()},
            )
        )
    return traces


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """The text that each token adds to those before it; together they are the decoded response.

    A character of several tokens belongs to the last of them.
    """
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end].tolist(), clean_up_tokenization_spaces=False))
        if end < len(ids):
            text = text.rstrip(_PART_OF_A_CHARACTER)
        texts.append(text[len(shown) :])
        shown = text
    return texts
