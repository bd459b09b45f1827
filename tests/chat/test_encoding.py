"""A text that a chat template has rendered keeps its one BOS token on every path that tokenizes texts."""

from functools import partial
from typing import Any

import datasets
import pytest
from tokenizers import processors
from transformers import ByT5Tokenizer

from rlhf_ppo.chat.encoding import continued_text, decode_tokens, encode_texts
from rlhf_ppo.environments.rendering import Renderer
from rlhf_ppo.environments.text_environment import TextEnvironment
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.tiny_models import EOS_TOKEN_ID as BOS
from tests.support.tiny_models import sentencepiece_tokenizer, tiny_gpt2, tiny_tokenizer

CHAT = {"role": "user", "content": "the film"}


@pytest.fixture
def tokenizer() -> Any:
    """Puts BOS first, as Llama's tokenizer does."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", BOS)]
    )
    return tokenizer


def test_a_rendered_text_keeps_one_bos_and_a_plain_one_gets_it(tokenizer: Any) -> None:
    plain, rendered, twice = encode_texts(tokenizer, ["good", "<eos>good", "<eos><eos>good"])
    assert plain == rendered == [BOS, *tokenizer("good", add_special_tokens=False)["input_ids"]]
    assert twice == [BOS, *plain]  # as it is written


def test_a_tokenizer_that_adds_nothing_leaves_texts_as_they_are_written() -> None:
    (ids,) = encode_texts(tiny_tokenizer(), ["<eos><eos>good"])
    assert ids[:2] == [BOS, BOS]


def test_prompts_and_observations_have_one_bos(tokenizer: Any) -> None:
    expected = tokenizer("good")["input_ids"]
    dataset = datasets.Dataset.from_dict({"prompt": ["<eos>good", "good"]})
    assert [prompt.tolist() for prompt in PromptDataset(dataset, tokenizer)] == [expected, expected]
    assert Renderer(tokenizer).prompt("<eos>good", {}) == expected


def test_a_prompt_whose_start_is_cut_keeps_its_bos(tokenizer: Any) -> None:
    texts = ["The movie was good", "good"]
    whole = tokenizer(texts[0])["input_ids"]
    for limit, expected in ((3, [BOS, *whole[-2:]]), (1, whole[-1:])):
        cut, short = PromptDataset.from_texts(texts, tokenizer, max_prompt_tokens=limit)
        assert cut.tolist() == expected
    assert short.tolist() == tokenizer("good")["input_ids"][-1:]


def test_a_text_environment_has_one_bos(tokenizer: Any) -> None:
    environment = TextEnvironment(tiny_gpt2(), tokenizer, prompt="<eos>", max_turns=0)
    *_, histories = environment.run(["good"])
    assert histories[0].tokens.tolist() == tokenizer("good")["input_ids"]


@pytest.mark.parametrize("make", [sentencepiece_tokenizer, partial(tiny_tokenizer, chat=True)])
@pytest.mark.parametrize(
    ("first", "observation"),
    [("film", ", was"), ("film", " good"), ("film", "\n good"), ("film", ""), ([CHAT], [CHAT | {"content": "good"}])],
)
def test_an_observation_adds_its_own_text_alone(make: Any, first: Any, observation: Any) -> None:
    tokenizer = make()
    reply = tokenizer("the film")["input_ids"]
    ids = Renderer(tokenizer).continuation(first, observation, reply[-1], finished=False, template_kwargs={})
    said = observation if isinstance(observation, str) else "\nuser: good\nassistant: "
    assert tokenizer.decode([*reply, *ids]) == "the film" + said


def test_tokens_that_the_tokenizer_does_not_know_have_no_text() -> None:
    """Embeddings are padded to a round number. Fast tokenizers leave such ids out, ByT5's in Python raises."""
    fast, slow = tiny_tokenizer(), ByT5Tokenizer()
    assert decode_tokens(fast, [*fast("good")["input_ids"], 400]) == "good"
    known = slow("good", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="range"):
        slow.decode([*known, 600])
    assert decode_tokens(slow, [*known, 600]) == "good"
    assert continued_text(slow, known, [600, *known]) == "good"
