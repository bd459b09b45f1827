"""Wrappers: what they compute, that folders load both ways, and what they refuse."""

import copy
import logging
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from huggingface_hub import CommitInfo
from peft import LoraConfig
from safetensors.torch import load_file, load_model, save_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    GPT2Model,
    PreTrainedModel,
)

from rlhf_ppo.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, pretrained
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_t5

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


def tiny_bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)).eval()


CAUSAL = [tiny_gpt2, tiny_llama, tiny_bloom]


def small_value_head(model: torch.nn.Module) -> Any:
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=0.0)


@pytest.mark.parametrize("build", CAUSAL)
def test_forward_gives_the_models_logits_and_the_heads_values(build: Any) -> None:
    plain = build()
    model = small_value_head(plain)
    logits, loss, values = model(TOKENS)
    output = plain(TOKENS, output_hidden_states=True)
    assert loss is None
    assert_close(logits, output.logits)
    assert_close(values, model.v_head(output.hidden_states[-1]).squeeze(-1))
    assert_close(plain.get_output_embeddings()(output.hidden_states[-1]), logits)


def test_labels_give_the_language_models_loss() -> None:
    plain = tiny_gpt2()
    _, loss, _ = small_value_head(plain)(TOKENS, labels=TOKENS)
    assert loss is not None
    assert_close(loss, plain(TOKENS, labels=TOKENS).loss)


@pytest.mark.parametrize("build", CAUSAL)
def test_padding_changes_nothing_on_either_side(build: Any) -> None:
    """Without position ids, GPT-2 behind left padding answers another question than the one asked."""
    model = small_value_head(build())
    row = TOKENS[:1]
    logits, _, values = model(row)
    junk = torch.tensor([[3, 4]])
    ones, zeros = torch.ones_like(row), torch.zeros_like(junk)
    left = model(torch.cat([junk, row], 1), attention_mask=torch.cat([zeros, ones], 1))
    right = model(torch.cat([row, junk], 1), attention_mask=torch.cat([ones, zeros], 1))
    assert_close(left[0][:, 2:], logits, atol=1e-5, rtol=1e-5)
    assert_close(left[2][:, 2:], values, atol=1e-5, rtol=1e-5)
    assert_close(right[0][:, :5], logits, atol=1e-5, rtol=1e-5)


def test_a_cache_continues_where_it_ended() -> None:
    model = small_value_head(tiny_gpt2())
    whole, _, values = model(TOKENS)
    mask = torch.ones_like(TOKENS)
    *_, cache = model(TOKENS[:, :3], attention_mask=mask[:, :3], return_past_key_values=True)
    rest, _, rest_values = model(TOKENS[:, 3:], attention_mask=mask, past_key_values=cache)
    assert_close(rest, whole[:, 3:], atol=1e-5, rtol=1e-5)
    assert_close(rest_values, values[:, 3:], atol=1e-5, rtol=1e-5)


def test_logits_of_a_bfloat16_model_are_float32_and_those_of_a_float64_model_stay() -> None:
    assert small_value_head(tiny_gpt2(dtype=torch.bfloat16))(TOKENS)[0].dtype == torch.float32
    assert small_value_head(tiny_gpt2(dtype=torch.float64))(TOKENS)[0].dtype == torch.float64


def test_generate_is_the_language_models() -> None:
    plain = tiny_gpt2()
    model = small_value_head(plain)
    mask = torch.ones_like(TOKENS)
    expected = plain.generate(TOKENS, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(TOKENS, attention_mask=mask, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("build", CAUSAL)
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_a_saved_folder_loads_as_wrapper_and_as_plain_model(build: Any, max_shard_size: str, tmp_path: Path) -> None:
    model = small_value_head(build())
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")

    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert again.value_head_was_loaded
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == build().state_dict().keys()
    assert_close(plain(TOKENS).logits, model(TOKENS)[0], atol=1e-6, rtol=0.0)


def test_the_file_holds_plain_names_and_the_value_head(tmp_path: Path) -> None:
    small_value_head(tiny_llama()).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"v_head.summary.weight", "v_head.summary.bias", "lm_head.weight", "model.norm.weight"} <= names
    assert not any(name.startswith("pretrained_model.") for name in names)


def test_loading_our_own_folder_reports_nothing_unexpected(tmp_path: Path) -> None:
    """The plain loader lists `v_head.*` as unexpected; a user of the wrapper should not be alarmed by it."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    reports = logging.getLogger("transformers.modeling_utils")
    small_value_head(tiny_gpt2()).save_pretrained(tmp_path)
    reports.addHandler(handler)
    try:
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
        assert not [text for text in records if "v_head" in text]
        AutoModelForCausalLM.from_pretrained(tmp_path)
        assert [text for text in records if "v_head" in text]
    finally:
        reports.removeHandler(handler)


def test_a_classic_checkpoint_in_pytorch_format_keeps_its_value_head(tmp_path: Path) -> None:
    model = small_value_head(tiny_gpt2())
    model.pretrained_model.save_pretrained(tmp_path)
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("v_head.")}
    torch.save(head, tmp_path / "pytorch_model.bin")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)


def test_weights_are_float32_unless_asked_otherwise(tmp_path: Path) -> None:
    """Steps of 1e-5 vanish in the rounding of bfloat16 weights."""
    tiny_gpt2(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).dtype == torch.float32
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    old = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert old.dtype == torch.bfloat16 and old.v_head.summary.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_that_comes_too_late_is_said_to_be_ignored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLMWithValueHead(tiny_gpt2(), **{name: torch.bfloat16})
    assert model.dtype == torch.float32
    assert f"Ignored ['{name}']" in caplog.text and "from_pretrained" in caplog.text


def test_state_dicts_load_back_alone_copied_and_inside_another_module() -> None:
    model = small_value_head(tiny_gpt2())
    other = small_value_head(tiny_gpt2(seed=1))
    other.load_state_dict(model.state_dict())
    assert_close(other(TOKENS)[0], model(TOKENS)[0])
    assert_close(other(TOKENS)[2], model(TOKENS)[2])

    holder = torch.nn.ModuleDict({"policy": copy.deepcopy(model)})
    assert "policy.transformer.wte.weight" in holder.state_dict()
    assert "policy.v_head.summary.bias" in holder.state_dict()
    holder.load_state_dict(holder.state_dict())


def test_a_model_with_tied_weights_loads_from_one_safetensors_file(tmp_path: Path) -> None:
    """Accelerate's checkpoints are such files; the tied copy is left out of them."""
    holder = torch.nn.ModuleDict({"module": small_value_head(tiny_gpt2())})
    save_model(holder, str(tmp_path / "model.safetensors"))
    other = torch.nn.ModuleDict({"module": small_value_head(tiny_gpt2(seed=1))})
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert_close(other["module"](TOKENS), holder["module"](TOKENS))


def test_a_missing_or_unknown_entry_of_a_state_dict_is_an_error() -> None:
    model = small_value_head(tiny_gpt2())
    state = model.state_dict()
    del state["v_head.summary.bias"]
    with pytest.raises(RuntimeError, match=r"v_head\.summary\.bias"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**model.state_dict(), "nonsense": torch.zeros(1)})


def test_attributes_of_the_language_model_are_reached_through_the_wrapper() -> None:
    model = small_value_head(tiny_gpt2())
    assert model.device.type == "cpu"
    assert model._no_split_modules == {"GPT2Block"}
    assert not hasattr(model, "no_such_thing")
    assert not hasattr(model, "_hf_hook")


def test_checkpointed_activations_give_the_same_gradients() -> None:
    def gradient(model: Any) -> torch.Tensor:
        model.train()(TOKENS)[0].log_softmax(-1)[..., 0].mean().backward()
        return model.pretrained_model.transformer.wte.weight.grad

    expected = gradient(small_value_head(tiny_gpt2()))
    model = small_value_head(tiny_gpt2())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.pretrained_model.transformer.h[0].gradient_checkpointing
    assert_close(gradient(model), expected)
    model.gradient_checkpointing_disable()
    assert not model.pretrained_model.transformer.h[0].gradient_checkpointing


def test_seq2seq_round_trip_and_values_of_the_decoder(tmp_path: Path) -> None:
    plain = tiny_t5()
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(plain)
    model.eval()
    decoder_ids = torch.tensor([[0, 5, 6], [0, 7, 8]])
    logits, _, values = model(TOKENS, decoder_input_ids=decoder_ids)
    assert logits.shape == (2, 3, plain.config.vocab_size)
    assert values.shape == (2, 3)

    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path).eval()
    assert_close(again(TOKENS, decoder_input_ids=decoder_ids)[2], values)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert_close(loaded(input_ids=TOKENS, decoder_input_ids=decoder_ids).logits, logits, atol=1e-6, rtol=0.0)


def test_a_model_without_output_embeddings_is_refused() -> None:
    with pytest.raises(ValueError, match="does not have a language model head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(GPT2Model(tiny_gpt2().config))


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="should be a string or a PreTrainedModel"):
        AutoModelForCausalLMWithValueHead.from_pretrained(17)


@pytest.mark.parametrize("kind", [AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead])
@pytest.mark.parametrize("name", ["a/folder/that/is/not/there", "./gone", Path("/gone")])
def test_a_folder_that_is_not_there_is_named(kind: Any, name: str | Path) -> None:
    """Not taken for a name on the hub, of which transformers would say that it is none."""
    with pytest.raises(ValueError, match=f"there is no model folder {name}"):
        kind.from_pretrained(name)


@pytest.mark.parametrize("device_map", [{"a": 0, "b": "cpu"}, {"a": "disk"}])
def test_an_offloaded_model_is_refused(device_map: dict[str, Any]) -> None:
    plain = tiny_gpt2()
    plain.hf_device_map = device_map
    with pytest.raises(ValueError, match="offloaded on CPU or disk"):
        small_value_head(plain)


def test_a_model_placed_whole_on_the_cpu_is_not_offloaded() -> None:
    plain = tiny_gpt2()
    plain.hf_device_map = {"": "cpu"}
    assert not small_value_head(plain).is_sequential_parallel


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_quantization_flags_become_the_config_that_transformers_takes(
    bits: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    class Loader:
        @staticmethod
        def from_pretrained(name: str, **kwargs: Any) -> PreTrainedModel:
            seen.update(kwargs)
            return tiny_gpt2()

    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "transformers_parent_class", Loader)
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), **{bits: True})
    assert isinstance(seen["quantization_config"], BitsAndBytesConfig)
    assert getattr(seen["quantization_config"], bits) is True
    assert bits not in seen and "dtype" not in seen and "" in seen["device_map"]


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> CommitInfo:
            uploaded.extend(path.name for path in Path(folder_path).iterdir())
            return CommitInfo(
                commit_url="https://huggingface.co/someone/model/commit/c0ffee",
                commit_message=commit_message,
                commit_description="",
                oid="c0ffee",
            )

    monkeypatch.setattr(pretrained, "HfApi", Api)
    model = small_value_head(tiny_gpt2())
    names_before = [name for name, _ in model.named_parameters()]
    assert model.push_to_hub("someone/model").oid == "c0ffee"
    assert {"model.safetensors", "config.json"} <= set(uploaded)
    assert [name for name, _ in model.named_parameters()] == names_before


@pytest.mark.parametrize("adapters", [None, LoraConfig(task_type="CAUSAL_LM", r=4)], ids=["full", "lora"])
def test_a_method_that_a_script_sets_on_the_model_switches_gradient_checkpointing(adapters: Any) -> None:
    """With the arguments of transformers 4, as LLaMA-Factory sets it."""
    received: list[Any] = []

    def enable(model: Any, gradient_checkpointing_kwargs: Any = None) -> None:
        received.append(gradient_checkpointing_kwargs)

    base = tiny_llama()
    base.gradient_checkpointing_enable = MethodType(enable, base)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=adapters)
    received.clear()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert received == [{"use_reentrant": True}]
