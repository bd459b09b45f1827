"""Chat reward models get messages, wherever they stand; no text goes through a template twice."""

import copy
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import requests
from transformers import LlamaConfig

from reward_model import ContractError, RewardModel, TextRule
from reward_model.models.ensemble import EnsembleRewardModel
from reward_model.models.text import encode, render, text_tail
from reward_model.serving.client import RemoteRewardModel
from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.chat.prompt import ChatPrompt
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.reward_model.conftest import classifier, saved, serving
from tests.support.patience import PATIENCE
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "How was the film?"}]
RENDERED = "user: How was the film?\nassistant: "
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    """A random chat reward model; its template writes "role: content" lines."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    return RewardModel.from_pretrained(saved(classifier(config), tmp_path_factory.mktemp("chat"), chat=True))


def with_template(model: RewardModel, template: str) -> RewardModel:
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return RewardModel(model.model, tokenizer, model.contract)


def test_in_ppo_every_way_to_a_chat_reward_model_gives_the_score_of_the_messages(chat_model: RewardModel) -> None:
    """The policy reads its own template; the reward model is asked about the messages, with its own."""
    tokenizer = tiny_tokenizer(chat=True)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("Hello", "Good film?", "Bad film?", "And?")]
    prompts = PromptDataset(datasets.Dataset.from_list(rows), tokenizer)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    other = with_template(chat_model, CHATML)
    with serving(chat_model) as url:
        sources: dict[str, Any] = {
            "messages": lambda responses, prompt, **_: chat_model(prompt, responses),
            "local": chat_model,
            "remote": RemoteRewardModel(url),
            "ensemble": EnsembleRewardModel([chat_model, chat_model]),
            "wrapped": lambda prompts, responses: [2 * score for score in chat_model(prompts, responses)],
            "other_messages": lambda responses, prompt, **_: other(prompt, responses),
            "other_template": other,
        }
        trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4), policy, None, tokenizer, dataset=prompts)
        state = trainer.train(sources, TrainConfig(iterations=1, sampling=SamplingConfig(max_new_tokens=4)))
    means = {name: state.metrics[f"env/reward/{name}_mean"] for name in sources}
    for name in ("local", "remote", "ensemble"):
        assert means[name] == pytest.approx(means["messages"], abs=1e-6), name
    assert means["wrapped"] == pytest.approx(2 * means["messages"], abs=1e-6)
    assert means["other_template"] == pytest.approx(means["other_messages"], abs=1e-6) != means["messages"]


def test_a_rendered_prompt_is_completed_and_never_rendered_again(chat_model: RewardModel) -> None:
    (expected,) = chat_model([MESSAGES], ["Lovely."])
    assert chat_model([RENDERED], ["Lovely."]) == [expected]
    assert chat_model([""], [RENDERED + "Lovely.\n"]) == [expected]
    assert chat_model([ChatPrompt("any text", MESSAGES)], ["Lovely."]) == [expected]
    assert chat_model(["How was the film?"], ["Lovely."]) == [expected]


@pytest.mark.parametrize(
    "prompt", ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", RENDERED[:-11], RENDERED[6:]]
)
def test_markup_that_cannot_be_completed_is_refused_with_the_remedy(chat_model: RewardModel, prompt: str) -> None:
    with pytest.raises(ValueError, match=r"sample 1.*template applied twice.*Give it the messages"):
        chat_model(["Hello", prompt], ["a", "b"])


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, MISTRAL], ids=["generation-prompt", "none"])
def test_other_templates_are_not_applied_twice_either(chat_model: RewardModel, template: str) -> None:
    """The markup is read off the template, which may write BOS, or no generation prompt."""
    tokenizer = copy.deepcopy(chat_model.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    rule = TextRule(template="chat", append_eos=False, max_length=64)
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    expected = render(tokenizer, rule, MESSAGES, "Lovely.")
    assert expected.count("film") == 1 and expected.startswith(prompt)
    for ready in (prompt, prompt.removeprefix("<s>")):
        assert render(tokenizer, rule, ready, "Lovely.") == expected
    assert render(tokenizer, rule, "", expected) == expected


def test_chat_prompts_are_texts_that_survive_copies(chat_model: RewardModel) -> None:
    prompt = ChatPrompt(RENDERED, MESSAGES)
    for again in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert again == RENDERED and again.messages == MESSAGES
    assert not hasattr(prompt + "x", "messages")


def post(url: str, path: str, body: Any) -> requests.Response:
    return requests.post(f"{url}/{path}", json=body, timeout=PATIENCE)


def test_openrlhf_is_answered_with_the_scores_of_samples(chat_model: RewardModel, reward_model: RewardModel) -> None:
    """Its `query` is the whole text, with padding and special tokens as they were sampled."""
    rendered = [RENDERED + "Lovely.", "<pad><pad>" + RENDERED + "Lovely.<eos>", RENDERED + "Lovely.\n"]
    expected = chat_model([MESSAGES] * 4, ["Lovely."] * 4)
    with serving(chat_model) as url:
        answer = post(url, "get_reward", {"query": rendered, "prompts": [RENDERED] * 3, "labels": None}).json()
        assert answer["rewards"] == answer["scores"] == pytest.approx(expected[:3], abs=1e-6)
        bare = {"query": ["How was the film?Lovely.<eos>", rendered[0]], "prompts": ["How was the film?", ""]}
        assert post(url, "get_reward", bare).json()["rewards"] == pytest.approx(expected[:2], abs=1e-6)
        refused = post(url, "get_reward", {"query": ["Who knows where the answer begins?"]})
        assert refused.status_code == 400 and "where its response begins" in refused.json()["error"]
        assert post(url, "get_reward", {"prompts": ["a"]}).status_code == 400
    with serving(reward_model) as url:
        texts = {"query": ["<pad>The movie was great", "The movie was great<eos>"], "prompts": None}
        plain = reward_model(["The movie was "] * 2, ["great"] * 2)
        assert post(url, "get_reward", texts).json()["rewards"] == pytest.approx(plain, abs=1e-6)


def test_what_a_client_can_mend_is_answered_400_with_the_reason(chat_model: RewardModel) -> None:
    picky = with_template(chat_model, NO_SYSTEM + CHATML)
    system = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    call = {"function": {"name": "f", "arguments": {"a": deep}}}
    calls = [{"role": "assistant", "content": "x", "tool_calls": [call]}]
    with serving(picky) as url:
        for prompt, response, reason in [
            (system, "Yes.", "System role not supported"),
            ("How?", "half an emoji \ud83d", "lone surrogate"),
            ([{"role": "user", "content": "\ude42"}], "Yes.", "lone surrogate"),
            ([{"role": "user"}], "Yes.", "must have 'content'"),
            ("How?", [{"content": "Yes."}], "'role'"),
            (MESSAGES, calls, "levels deep"),
        ]:
            refused = post(url, "score", {"prompts": ["Hello", prompt], "responses": ["a", response]})
            assert refused.status_code == 400, refused.text
            assert reason in refused.json()["error"] and "sample 1" in refused.json()["error"]
        assert post(url, "score", {"prompts": ["Hello"], "responses": ["a"]}).status_code == 200


def test_messages_of_a_prompt_must_fit_the_prompts(chat_model: RewardModel) -> None:
    with serving(chat_model) as url:
        body = {"prompts": [RENDERED], "responses": ["Lovely."]}
        (expected,) = chat_model([MESSAGES], ["Lovely."])
        assert post(url, "score", body | {"messages": [MESSAGES]}).json()["scores"] == pytest.approx([expected])
        assert post(url, "score", body | {"messages": [None]}).json()["scores"] == pytest.approx([expected])
        for wrong in ([], "x", [MESSAGES, MESSAGES], ["x"], [["x"]]):
            assert post(url, "score", body | {"messages": wrong}).status_code == 400


CAN_BE_CUT = [
    "The movie was good, I liked it. ",
    "naïve; 東京、映画。\n\n",
    "it's 12,345.6 <b>bold</b>\t\t",
    "電影",
    " ",
]


@pytest.mark.parametrize("text", [*CAN_BE_CUT, "o"])
def test_only_the_end_of_a_very_long_text_is_tokenized(text: str) -> None:
    """The tokens are those of the whole text. A run of `o`, of which two are one token, is counted from its start."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["oo"])
    tokenizer.truncation_side = "left"
    long = text * (199_999 // len(text))
    whole = tokenizer(long + " and the end", verbose=False)["input_ids"][-63:]
    ids = encode(tokenizer, TextRule(max_length=64), long, " and the end", truncate=True)
    assert ids == [*whole, tokenizer.eos_token_id]
    assert (len(text_tail(tokenizer, long, tokens=63)) < len(long) / 10) == (text in CAN_BE_CUT)


def test_a_plain_reward_model_reads_the_text_of_a_conversation(reward_model: RewardModel) -> None:
    assert reward_model([ChatPrompt(RENDERED, MESSAGES)], ["great"]) == reward_model([RENDERED], ["great"])
    with pytest.raises(ContractError, match="trained on plain text"):
        reward_model([MESSAGES], ["great"])


def test_a_saved_chat_model_loads_from_its_folder_with_the_same_scores(chat_model: RewardModel, tmp_path: Path) -> None:
    folder = saved(chat_model.model, tmp_path, chat=True)
    assert RewardModel.from_pretrained(folder)([MESSAGES], ["Lovely."]) == chat_model([MESSAGES], ["Lovely."])
