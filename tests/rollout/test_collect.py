"""The texts of responses, as reward sources read them."""

from typing import Any

import datasets
import pytest
import torch

from rlhf_ppo.rollout.collect import Collector
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from tests.support.tiny_models import sentencepiece_tokenizer, tiny_tokenizer


def response_text(tokenizer: Any, prompt: Any, answer: list[int], *, encoder_decoder: bool = False) -> str:
    """What a reward source reads of a sampled answer."""

    def sampler(_model: Any, prompts: list[torch.Tensor], *_: Any, **__: Any) -> Samples:
        return Samples(prompts=prompts, responses=[torch.tensor(answer)], logprobs=None, finished=[True])

    model: Any = torch.nn.Module()
    model.is_encoder_decoder = encoder_decoder
    collector = Collector(
        model=model, tokenizer=tokenizer, sampler=sampler,
        sampling=SamplingConfig(max_new_tokens=4), device=torch.device("cpu"),
    )  # fmt: skip
    batch = PromptDataset(datasets.Dataset.from_dict({"prompt": [prompt]}), tokenizer).batch([0])
    return collector.sample(batch, torch.Generator()).responses[0]


@pytest.mark.parametrize("tokenizer", [sentencepiece_tokenizer(), tiny_tokenizer()], ids=["sentencepiece", "bytes"])
def test_prompt_and_response_are_together_the_text_of_all_tokens(tokenizer: Any) -> None:
    whole, prompt = tokenizer("the film was good")["input_ids"], tokenizer("the film was")["input_ids"]
    answer = [*whole[len(prompt) :], tokenizer.eos_token_id]
    assert response_text(tokenizer, "the film was", answer) == " good"


def test_an_answer_to_messages_and_a_decoders_text_begin_without_a_space() -> None:
    tokenizer = sentencepiece_tokenizer()
    answer = tokenizer("good")["input_ids"]
    assert response_text(tokenizer, [{"role": "user", "content": "the film"}], answer) == "good"
    assert response_text(tokenizer, "the film was", answer, encoder_decoder=True) == "good"
