"""PEFT: training moves the adapter only, folders round-trip, the reference is where training started."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification

from rlhf_ppo.models import (
    AutoModelForCausalLMWithValueHead,
    create_reference_model,
    prepare_reference_adapter,
    reference_adapter,
)
from rlhf_ppo.models.critic import SeparateCritic, attach_critic, save_critic
from rlhf_ppo.models.shared_base_adapters import RewardAdapterModel, attach_reward_adapter
from tests.models.zoo import build
from tests.support.tiny_models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "fan_in_fan_out": True, "task_type": "CAUSAL_LM", **kwargs})


def trained(model: AutoModelForCausalLMWithValueHead, *, steps: int = 2) -> AutoModelForCausalLMWithValueHead:
    """Move whatever is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        logits, _, values = model(TOKENS)
        (logits.log_softmax(-1)[..., 7].mean() + values.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def flags(model: torch.nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's folder: an adapter's config remembers where its base lies."""
    tiny_gpt2().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sft(base: Path, tmp_path: Path) -> Path:
    """A supervised adapter's folder: an adapter that changes the base, and no value head."""
    model = trained(AutoModelForCausalLMWithValueHead.from_pretrained(str(base), peft_config=lora()))
    model.pretrained_model.save_pretrained(str(tmp_path / "sft"))
    return tmp_path / "sft"


def test_a_peft_config_leaves_only_adapter_and_value_head_trainable() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora())
    assert model.is_peft_model
    trainable = {name for name, flag in flags(model).items() if flag}
    assert trainable and all("lora_" in name or name.startswith("v_head.") for name in trainable)


def test_training_moves_the_adapter_and_not_the_base() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora())
    before = model(TOKENS)[0]
    trained(model)
    assert not torch.allclose(model(TOKENS)[0], before)
    with model.pretrained_model.disable_adapter():
        assert_close(model(TOKENS)[0], before)


def test_adapter_and_value_head_round_trip_beside_each_other(base: Path, tmp_path: Path) -> None:
    model = trained(AutoModelForCausalLMWithValueHead.from_pretrained(str(base), peft_config=lora()))
    model.save_pretrained(tmp_path / "ppo")
    saved = torch.load(tmp_path / "ppo" / "pytorch_model.bin", weights_only=True)
    assert sorted(saved) == ["v_head.summary.bias", "v_head.summary.weight"]

    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "ppo")).eval()
    for (name, one), (other_name, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name and torch.equal(one, two)
    assert_close(again(TOKENS), model(TOKENS))
    assert not any(flag for name, flag in flags(again).items() if "lora_" in name)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    assert_close(plain(TOKENS).logits, model(TOKENS)[0], atol=1e-6, rtol=0.0)


def test_a_merged_model_equals_the_adapted_one_and_loads_plainly(tmp_path: Path) -> None:
    model = trained(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora()))
    expected = model(TOKENS)[0]
    merged = model.pretrained_model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(plain(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_loaded_adapter_trains_on_when_asked(sft: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(sft), is_trainable=True)
    assert all(flag for name, flag in flags(model).items() if "lora_" in name)


def test_all_weights_of_a_peft_model_are_in_its_state_dict() -> None:
    """So that a training checkpoint holds the adapter too."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora())
    other = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=1), peft_config=lora())
    other.load_state_dict(trained(model).state_dict())
    assert_close(other.eval()(TOKENS), model(TOKENS))


def test_the_reference_of_a_fresh_adapter_is_the_base() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora())
    start = model(TOKENS)[0]
    assert prepare_reference_adapter(model) is None
    trained(model)
    with reference_adapter(model):
        assert_close(model(TOKENS)[0], start)
    assert not torch.allclose(model(TOKENS)[0], start)


def test_the_reference_of_a_supervised_adapter_is_that_adapter(sft: Path) -> None:
    """With the base in its place, KL is large before the first step."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(sft), is_trainable=True).eval()
    assert prepare_reference_adapter(model) == "reference"
    assert prepare_reference_adapter(model) == "reference"
    start = model(TOKENS)[0].detach()
    with reference_adapter(model):
        assert torch.equal(model(TOKENS)[0], start)
    trained(model)
    with reference_adapter(model):
        assert torch.equal(model(TOKENS)[0], start)
    assert not torch.allclose(model(TOKENS)[0], start)


def test_the_same_for_an_adapter_given_as_an_object(base: Path, sft: Path) -> None:
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(sft), is_trainable=True)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(peft_model).eval()
    start = model(TOKENS)[0].detach()
    assert prepare_reference_adapter(model) == "reference"
    trained(model)
    with reference_adapter(model):
        assert torch.equal(model(TOKENS)[0], start)


def test_the_reference_survives_saving_and_loading(sft: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(sft), is_trainable=True).eval()
    start = model(TOKENS)[0].detach()
    prepare_reference_adapter(model)
    trained(model).save_pretrained(tmp_path / "ppo")

    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "ppo"), is_trainable=True).eval()
    assert prepare_reference_adapter(again) == "reference"
    assert_close(again(TOKENS), model(TOKENS))
    with reference_adapter(again):
        assert_close(again(TOKENS)[0], start)
    assert not any(flag for name, flag in flags(again).items() if ".reference." in name)
    assert all(flag for name, flag in flags(again).items() if ".default." in name)


def test_a_run_that_started_from_the_base_goes_on_with_the_base_as_reference(base: Path, tmp_path: Path) -> None:
    model = trained(AutoModelForCausalLMWithValueHead.from_pretrained(str(base), peft_config=lora()))
    model.save_pretrained(tmp_path / "ppo")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "ppo"), is_trainable=True)
    assert prepare_reference_adapter(again) is None


def test_a_folder_that_is_saved_into_again_keeps_nothing_of_the_earlier_policy(
    base: Path, sft: Path, tmp_path: Path
) -> None:
    """Of supervised adapters, full weights and fresh adapters, each after the other; what is replaced is renamed."""
    folder, load = str(tmp_path / "out"), AutoModelForCausalLMWithValueHead.from_pretrained
    supervised = load(str(sft), is_trainable=True)
    prepare_reference_adapter(supervised)
    attach_critic(supervised, SeparateCritic.from_policy(supervised))
    for model in (supervised, trained(load(str(base))), trained(load(str(base), peft_config=lora()))):
        model.save_pretrained(folder)
        if model is supervised:
            save_critic(model, Path(folder))
        again = load(folder, is_trainable=True).eval()
        assert_close(again(TOKENS), model.eval()(TOKENS))
        assert again.is_peft_model == model.is_peft_model
        assert (again.critic is None) == (model is not supervised)
        if again.is_peft_model:
            assert (prepare_reference_adapter(again) == "reference") == (model is supervised)
    kept = ("adapter_config.1.json", "reference/adapter_config.1.json", "critic/head.1.safetensors")
    assert all((tmp_path / "out" / name).is_file() for name in kept)


def test_switching_to_the_reference_leaves_flags_and_adapter_as_they_were(sft: Path) -> None:
    """PEFT turns gradients on for each adapter it activates, a frozen one included."""
    for is_trainable in (True, False):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(str(sft), is_trainable=is_trainable)
        prepare_reference_adapter(model)
        before = flags(model)
        with reference_adapter(model):
            assert model.pretrained_model.active_adapter == "reference"
        assert flags(model) == before
        with contextlib.suppress(KeyError), reference_adapter(model):
            raise KeyError
        assert flags(model) == before
        assert model.pretrained_model.active_adapter == "default"


def test_a_model_without_adapters_cannot_be_its_own_reference() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    with pytest.raises(ValueError, match="create_reference_model"), reference_adapter(model):
        pass
    with pytest.raises(ValueError, match="create_reference_model"):
        prepare_reference_adapter(model)


def test_a_copied_reference_of_a_peft_model_is_frozen() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora())
    reference = create_reference_model(model)
    assert not any(flags(reference).values()) and any(flags(model).values())


def reward_adapter_in(folder: Path, *, bias: str = "none") -> torch.Tensor:
    """Save a sequence classifier's adapter; give its scores at the last token."""
    config = tiny_gpt2().config
    config.num_labels = 1
    classifier = GPT2ForSequenceClassification(config).eval()
    classifier.transformer.load_state_dict(tiny_gpt2().transformer.state_dict())
    reward_model = get_peft_model(classifier, lora(task_type="SEQ_CLS", bias=bias)).eval()
    with torch.no_grad():
        for name, parameter in reward_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    reward_model.save_pretrained(str(folder))
    return reward_model(TOKENS).logits.detach()


def test_a_reward_adapter_scores_as_the_classifier_did_whatever_the_policy_learns(tmp_path: Path) -> None:
    expected = reward_adapter_in(tmp_path)
    peft_model = get_peft_model(tiny_gpt2(), lora())
    model = AutoModelForCausalLMWithValueHead.from_pretrained(peft_model, reward_adapter=str(tmp_path))
    before = flags(model)
    assert not any(flag for name, flag in before.items() if "reward_adapter" in name or name.startswith("score"))
    trained(model)
    policy = model(TOKENS)[0]
    scores = model.compute_reward_score(TOKENS)
    assert scores.shape == (2, 5, 1)
    assert_close(scores[:, -1, :], expected, atol=1e-5, rtol=1e-5)
    assert flags(model) == before
    assert torch.equal(model(TOKENS)[0], policy)
    model.train().pretrained_model.base_model.model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    for call in (model.compute_reward_score, RewardAdapterModel(model)):
        call(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
        assert [module.training for module in model.modules()] == modes
        with pytest.raises(IndexError):  # no such token
            call(input_ids=TOKENS + 10_000, attention_mask=torch.ones_like(TOKENS))
        assert [module.training for module in model.modules()] == modes


def test_a_bias_in_the_adapter_is_no_bias_of_the_score_head(tmp_path: Path) -> None:
    expected = reward_adapter_in(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "score" in config["modules_to_save"]
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_gpt2(), peft_config=lora(), reward_adapter=str(tmp_path), reward_adapter_name="judge"
    )
    assert model.score.bias is None and model.rm_adapter_name == "judge"
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), TOKENS], 1)
    mask = torch.cat([torch.zeros(2, 2, dtype=torch.long), torch.ones_like(TOKENS)], 1)
    assert_close(model.compute_reward_score(padded, mask)[:, -1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_reward_adapter_on_a_base_with_an_added_padding_token_leaves_the_policys_base(
    base: Path, tmp_path: Path
) -> None:
    """PEFT saves the longer token embeddings with it."""
    classifier = GPT2ForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.resize_token_embeddings(321, mean_resizing=False)
    classifier.config.pad_token_id = 320
    judge = get_peft_model(classifier, lora(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    judge.save_pretrained(tmp_path / "judge")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(base), peft_config=lora(), reward_adapter=str(tmp_path / "judge")
    ).eval()
    assert_close(model.compute_reward_score(TOKENS)[:, -1], judge(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert_close(model(TOKENS)[0], AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits)


def test_a_reward_adapter_with_embeddings_of_its_own_is_refused(base: Path, tmp_path: Path) -> None:
    """They would replace the policy's."""
    classifier = GPT2ForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.transformer.wte.weight.data += 1
    judge = get_peft_model(classifier, lora(task_type="SEQ_CLS", modules_to_save=["wte", "score"]))
    judge.save_pretrained(tmp_path / "judge")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base), peft_config=lora())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"with another .*wte"):
        attach_reward_adapter(model, str(tmp_path / "judge"))
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_misuse_of_reward_adapters_is_named(sft: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="should be a string"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), reward_adapter=3)
    with pytest.raises(ValueError, match="can only be used with a PeftModel"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), reward_adapter=str(tmp_path))
    with pytest.raises(ValueError, match="has no score head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora(), reward_adapter=str(sft))
    with pytest.raises(ValueError, match="there is no model folder"):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            tiny_gpt2(), peft_config=lora(), reward_adapter=str(tmp_path / "gone")
        )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    with pytest.raises(ValueError, match="does not support reward modeling adapter"):
        model.compute_reward_score(TOKENS)


def test_prompt_learning_is_refused() -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptLearningConfig is not supported"):
        AutoModelForCausalLMWithValueHead.from_pretrained(get_peft_model(tiny_gpt2(), prompts))


def test_a_peft_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="peft_config"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config={"r": 4})


@pytest.mark.parametrize("name, problem", [(None, "names no base"), ("/gone/base", "/gone/base as its base model")])
def test_an_adapter_without_its_base_is_an_error_with_a_way_out(sft: Path, name: str | None, problem: str) -> None:
    config = json.loads((sft / "adapter_config.json").read_text())
    (sft / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    with pytest.raises(ValueError, match=f"{problem}.* put the adapter"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(sft))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_an_adapter_on_a_resized_vocabulary_loads_with_its_tokens(
    tied: bool, saved: list[str] | None, tmp_path: Path
) -> None:
    """The folder of the base has fewer."""
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain.resize_token_embeddings(330)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=saved, init_lora_weights=False)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(plain, peft_config=config).eval()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved")).eval()
    tokens = torch.tensor([[5, 325, 329]])
    assert_close(again(tokens)[0], model(tokens)[0])


def test_a_peft_config_beside_a_saved_adapter_is_ignored_with_a_log_line(
    sft: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(sft), peft_config=lora(r=2))
    assert "`peft_config` is ignored" in caplog.text
    assert model.pretrained_model.peft_config["default"].r == 4


def test_an_adapter_of_a_model_that_reads_images_loads_with_its_base(tmp_path: Path) -> None:
    """AutoModelForCausalLM does not know its type."""
    build("vision/llava").save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "base"), peft_config=config).eval()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved")).eval()
    assert_close(again(TOKENS)[0], model(TOKENS)[0])
