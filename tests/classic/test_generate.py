"""`generate` of the classic trainer: shapes, order, cuts; the same tokens as `model.generate`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ppo.classic.generate import as_sampling_config, generate_responses
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.tiny_models import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE, tiny_gpt2, tiny_t5, tiny_tokenizer

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD_TOKEN_ID}
BEAMS: dict[str, Any] = {**GREEDY, "num_beams": 2}  # what the decode loop does not do


def queries(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def by_generate(model: Any, query: Tensor, **settings: Any) -> list[int]:
    output = model.generate(input_ids=query[None], attention_mask=torch.ones_like(query)[None], **settings)[0].tolist()
    response = output[len(query) :]
    return response[: response.index(EOS_TOKEN_ID) + 1] if EOS_TOKEN_ID in response else response


def counting_gpt2() -> Any:
    """A GPT-2 that counts: after token t comes t + 1, because its embedding of t is read back by its LM head."""
    model = tiny_gpt2(n_embd=VOCAB_SIZE, n_head=2, n_layer=1, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.lm_head.weight = nn.Parameter(torch.eye(VOCAB_SIZE).roll(1, dims=0) * 50)
        model.transformer.wte.weight = nn.Parameter(torch.eye(VOCAB_SIZE))
    return model


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["loop", "generate"])
def test_a_list_gives_one_dimensional_tensors_in_order_with_their_queries(settings: dict[str, Any]) -> None:
    model, inputs = tiny_gpt2(), queries(3, 9, 5, 1, 7)
    outputs = generate_responses(model, tiny_tokenizer(), inputs, **settings)
    assert isinstance(outputs, list)
    for query, output in zip(inputs, outputs, strict=True):
        assert output.tolist() == query.tolist() + by_generate(model, query, **settings)


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["loop", "generate"])
def test_return_prompt_false_gives_the_response_alone(settings: dict[str, Any]) -> None:
    model, inputs = tiny_gpt2(), queries(3, 9)
    outputs = generate_responses(model, tiny_tokenizer(), inputs, return_prompt=False, **settings)
    assert [o.tolist() for o in outputs] == [by_generate(model, q, **settings) for q in inputs]


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["loop", "generate"])
@pytest.mark.parametrize("return_prompt", [True, False])
def test_one_query_gives_a_row(settings: dict[str, Any], return_prompt: bool) -> None:
    model, (query,) = tiny_gpt2(), queries(5)
    output = generate_responses(model, tiny_tokenizer(), query, return_prompt=return_prompt, **settings)
    assert isinstance(output, Tensor)
    assert output.tolist() == [query.tolist() * return_prompt + by_generate(model, query, **settings)]


def test_stop_tokens_may_be_a_tensor() -> None:
    """As transformers takes them."""
    config = as_sampling_config(tiny_gpt2(), {**GREEDY, "eos_token_id": torch.tensor([5, 6])})
    assert config is not None and config.stop_token_ids == (5, 6)


def test_a_two_dimensional_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"query_tensor must be a tensor of shape \(`seq_len`\) or a list of tensors"):
        generate_responses(tiny_gpt2(), tiny_tokenizer(), torch.ones(1, 3, dtype=torch.long), **GREEDY)


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["loop", "generate"])
def test_an_end_of_sequence_token_in_the_query_cuts_nothing(settings: dict[str, Any]) -> None:
    """Where BOS is EOS, as in GPT-2, every query begins with it (defect D5)."""
    model = tiny_gpt2()
    query = torch.cat([torch.tensor([EOS_TOKEN_ID]), queries(4)[0]])
    (output,) = generate_responses(model, tiny_tokenizer(), [query], **settings)
    assert len(output) > len(query)
    assert output.tolist() == query.tolist() + by_generate(model, query, **settings)


@pytest.mark.parametrize("extra", [{}, {"num_beams": 2}], ids=["loop", "generate"])
@pytest.mark.parametrize("remove_padding, expected", [(True, [318, 319, 0, 1]), (False, [318, 319, 0, 1, 2, 3])])
def test_a_response_is_cut_after_its_first_end_of_sequence_token(
    extra: dict[str, Any], remove_padding: bool, expected: list[int]
) -> None:
    """The model counts 318, 319, 0, 1, 2, ... and is told never to stop; token 1 is the tokenizer's EOS."""
    outputs = generate_responses(
        counting_gpt2(), tiny_tokenizer(), [torch.tensor([317])], return_prompt=False, remove_padding=remove_padding,
        max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD_TOKEN_ID, **extra,
    )  # fmt: skip
    assert outputs[0].tolist() == expected


@pytest.mark.parametrize("extra", [{}, {"num_beams": 2}], ids=["loop", "generate"])
def test_the_length_sampler_is_called_once_a_chunk(extra: dict[str, Any]) -> None:
    lengths = iter([2, 5, 3])
    outputs = generate_responses(
        counting_gpt2(), tiny_tokenizer(), [torch.tensor([9])] * 5, length_sampler=lambda: next(lengths), batch_size=2,
        return_prompt=False, do_sample=False, pad_token_id=PAD_TOKEN_ID, **extra,
    )  # fmt: skip
    assert [len(output) for output in outputs] == [2, 2, 5, 5, 3]
    assert next(lengths, None) is None


def test_the_length_sampler_sets_the_length_of_a_single_query() -> None:
    output = generate_responses(
        counting_gpt2(),
        tiny_tokenizer(),
        torch.tensor([9]),
        length_sampler=lambda: 4,
        return_prompt=False,
        do_sample=False,
    )
    assert output.tolist() == [[10, 11, 12, 13]]


def test_an_encoder_decoder_keeps_its_start_token_and_the_query_stays_out() -> None:
    model, inputs = tiny_t5(), queries(3, 6)
    outputs = generate_responses(model, tiny_tokenizer(), inputs, **GREEDY)
    for query, output in zip(inputs, outputs, strict=True):
        whole = model.generate(input_ids=query[None], **GREEDY)[0].tolist()
        assert output.tolist() == (whole[: whole.index(EOS_TOKEN_ID) + 1] if EOS_TOKEN_ID in whole else whole)


def test_sampling_follows_the_global_seed_and_draws_varied_responses() -> None:
    model, runs = tiny_gpt2(), []
    settings = {"max_new_tokens": 8, "do_sample": True, "top_k": 0.0, "top_p": 1.0, "min_length": -1, "pad_token_id": 0}
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append([r.tolist() for r in generate_responses(model, tiny_tokenizer(), queries(4, 4, 6), **settings)])
    assert runs[0] == runs[1] != runs[2]


def test_several_responses_to_one_query_are_rows_of_one_tensor() -> None:
    settings = {"max_new_tokens": 3, "do_sample": True, "eos_token_id": None, "num_return_sequences": 4}
    output = generate_responses(tiny_gpt2(), tiny_tokenizer(), queries(5)[0], **settings)
    assert isinstance(output, Tensor)
    assert output.shape == (4, 8)


def test_an_empty_list_gives_an_empty_list() -> None:
    assert generate_responses(tiny_gpt2(), tiny_tokenizer(), [], **GREEDY) == []


def test_settings_of_generate_are_read_as_generate_reads_them() -> None:
    """Greedy unless asked; top-k 50 unless told otherwise; stop tokens from the model's generation config."""
    model = tiny_gpt2()
    assert as_sampling_config(model, {"max_new_tokens": 5}) == SamplingConfig(
        max_new_tokens=5, do_sample=False, top_k=50, stop_token_ids=(EOS_TOKEN_ID,)
    )
    classic = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 3, "max_new_tokens": 32}
    assert as_sampling_config(model, classic) == SamplingConfig(max_new_tokens=32, stop_token_ids=(EOS_TOKEN_ID,))
    stops = {"stop_strings": "x", "tokenizer": tiny_tokenizer()}  # `generate` needs both
    assert as_sampling_config(
        model, {**classic, "eos_token_id": -1, "temperature": 0.7, "repetition_penalty": 1.2, **stops}
    ) == SamplingConfig(
        max_new_tokens=32, temperature=0.7, repetition_penalty=1.2, stop_strings=("x",), stop_token_ids=()
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 4},
        {"min_length": 5},
        {"typical_p": 0.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3]]},
        {"num_return_sequences": 2},
        {"stopping_criteria": [lambda *_: True]},
        {"max_new_tokens": None},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_beyond_the_decode_loop_are_left_to_generate(setting: dict[str, Any]) -> None:
    assert as_sampling_config(tiny_gpt2(), {"max_new_tokens": 4, **setting}) is None


def test_a_misspelt_setting_is_refused_whatever_its_value() -> None:
    with pytest.raises(ValueError, match=r"not used by the model: \['topk'\]"):
        generate_responses(tiny_gpt2(), tiny_tokenizer(), queries(3), max_new_tokens=2, do_sample=True, topk=0)
