"""Import paths, private names, arguments and statistics that scripts for TRL's classic (0.11 and before) rely on."""

import json
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import GPT2LMHeadModel, HfArgumentParser

from rlhf_ppo import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    SeparateCritic,
    attach_critic,
    create_reference_model,
)
from rlhf_ppo.classic import surface
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
RESPONSES = [torch.tensor([10, 11]), torch.tensor([12, 13, 14, EOS_TOKEN_ID])]
SCORES = [torch.tensor(1.0), torch.tensor(-1.0)]
TEXTS = {"query": ["a", "b"], "response": ["c", "d"]}

_CORE = (
    "LengthSampler PPODecorators WANDB_PADDING clip_by_value convert_to_scalar entropy_from_logits flatten_dict "
    "logprobs_from_logits masked_mean masked_var masked_whiten respond_to_batch set_seed stack_dicts "
    "stats_to_np top_k_top_p_filtering whiten"
)
_MODELS = (
    "AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead PreTrainedModelWrapper "
    "create_reference_model SUPPORTED_ARCHITECTURES"
)
_UTILS = "AdaptiveKLController FixedKLController RunningMoments disable_dropout_in_model exact_div"
PATHS = {
    "": f"{_MODELS} PPOConfig PPOTrainer BestOfNSampler set_seed",
    "core": _CORE,
    "extras": "BestOfNSampler",
    "extras.best_of_n_sampler": "BestOfNSampler",
    "models": f"{_MODELS} unwrap_model_for_generation",
    "models.modeling_base": "PreTrainedModelWrapper create_reference_model LAYER_PATTERNS",
    "models.modeling_value_head": "AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead ValueHead",
    "models.utils": "SUPPORTED_ARCHITECTURES unwrap_model_for_generation",
    "trainer": f"PPOConfig PPOTrainer BaseTrainer {_UTILS}",
    "trainer.ppo_config": "PPOConfig",
    "trainer.ppo_trainer": f"PPOConfig PPOTrainer {_CORE} {_MODELS} {_UTILS}",
    "trainer.utils": _UTILS,
}
"""Module below `trl` -> names that public scripts import from it."""


def policy(**adapter: Any) -> AutoModelForCausalLMWithValueHead:
    model = tiny_llama() if adapter else tiny_gpt2()
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, **adapter)


def trainer_of(model: Any = None, **settings: Any) -> PPOTrainer:
    config = PPOConfig(**{"batch_size": 2, "mini_batch_size": 2, "ppo_epochs": 1, "diagnose": False, **settings})
    return PPOTrainer(config, model or policy(), None, tiny_tokenizer())


@pytest.mark.parametrize("path", PATHS)
def test_every_import_of_a_public_script_is_answered(path: str) -> None:
    """With `trl` replaced by the package's name, and with `trl` itself once compat is imported: the same objects."""
    import_module("rlhf_ppo.compat")
    own, lent = import_module(f"rlhf_ppo.{path}".rstrip(".")), import_module(f"trl.{path}".rstrip("."))
    for name in PATHS[path].split():
        assert getattr(own, name) is not None, name
        of_trl = str(getattr(getattr(lent, name), "__module__", "")).startswith("trl.")  # what it has still stays
        assert of_trl or getattr(lent, name) is getattr(own, name), name
    with pytest.raises(AttributeError, match="nonsense"):
        own.nonsense  # noqa: B018


def test_the_rest_of_trl_is_as_it_was() -> None:
    import_module("rlhf_ppo.compat")
    trl = import_module("trl")
    assert trl.RewardTrainer.__module__ == "trl.trainer.reward_trainer"
    assert import_module("trl.models.utils").unwrap_model_for_generation.__module__ == "trl.models.utils"


def test_the_core_functions_compute_what_their_names_say() -> None:
    """By hand: values 1, 2, 6 with mask 1, 1, 0 have mean 3/2 and variance 1/2."""
    core = import_module("rlhf_ppo.core")
    values, mask = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 1, 0])
    assert float(core.masked_mean(values, mask)) == 1.5
    assert float(core.masked_var(values, mask)) == 0.5
    assert float(core.masked_var(values, mask, unbiased=False)) == 0.25
    assert torch.allclose(core.masked_whiten(values, mask), (values - 1.5) / 0.5**0.5)
    assert torch.allclose(core.masked_whiten(values, mask, shift_mean=False), (values - 1.5) / 0.5**0.5 + 1.5)
    assert torch.allclose(core.whiten(values), (values - 3.0) / 7.0**0.5)
    assert core.masked_mean(torch.stack([values, values]), torch.stack([mask, 1 - mask]), axis=1).tolist() == [1.5, 6.0]
    logits = torch.tensor([[[0.0, 0.0, float(np.log(2.0))]]])
    assert torch.allclose(core.logprobs_from_logits(logits, torch.tensor([[2]])).exp(), torch.tensor([[0.5]]))
    assert torch.allclose(core.logprobs_from_logits(logits, None, gather=False).exp(), torch.tensor([0.25, 0.25, 0.5]))
    assert torch.allclose(core.entropy_from_logits(torch.zeros(1, 4)), torch.tensor([4.0]).log())
    assert core.clip_by_value(values, torch.zeros(3), torch.full((3,), 2.0)).tolist() == [1.0, 2.0, 2.0]
    assert core.top_k_top_p_filtering(torch.tensor([[1.0, 3.0, 2.0]]), top_k=1).isfinite().tolist() == [
        [False, True, False]
    ]
    assert core.flatten_dict({"a": {"b": 1, "c": {"d": 2}}}) == {"a/b": 1, "a/c/d": 2}
    stacked = core.stack_dicts([{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor(3.0)}])
    assert stacked["a"].tolist() == [[1.0, 2.0], [3.0, core.WANDB_PADDING]]
    scalars = core.convert_to_scalar(
        core.stats_to_np({"a": torch.tensor([1.5]), "b": torch.tensor([1.0, 2.0]), "c": 2})
    )
    assert scalars["a"] == 1.5 and scalars["b"].tolist() == [1.0, 2.0] and scalars["c"] == 2.0


def test_the_running_moments_of_a_trainer_are_the_classics() -> None:
    """Scores 1, 3, then 5: mean 3 and variance 4 of all, mean 5 of the last."""
    moments = trainer_of().running
    assert moments.accelerator.num_processes == 1
    moments.update(torch.tensor([1.0, 3.0]))
    mean, _ = moments.update(torch.tensor([5.0]))
    assert (float(mean), float(moments.mean), float(moments.var)) == (5.0, 3.0, 4.0)


def test_private_methods_of_the_classic_are_there_and_are_called() -> None:
    class Own(PPOTrainer):
        def _generate_batched(self, *args: Any, **kwargs: Any) -> Any:
            return [row + 1 for row in super()._generate_batched(*args, **kwargs)]

        def _save_pretrained(self, save_directory: Any) -> None:
            self.saved = save_directory

    plain, own = trainer_of(), Own(PPOConfig(batch_size=2, mini_batch_size=2), policy(), None, tiny_tokenizer())
    settings = {"do_sample": False, "max_new_tokens": 2, "return_prompt": False}
    for one, other in zip(plain.generate(QUERIES, **settings), own.generate(QUERIES, **settings), strict=True):
        assert torch.equal(one + 1, other)
    own.save_pretrained("somewhere")
    assert own.saved == "somewhere"
    assert plain._early_stop(torch.tensor(9.0)) is False
    assert plain.gather_stats({"a": torch.tensor(2.0), "b": 1}) == {"a": torch.tensor(2.0), "b": 1}
    with plain.optional_peft_ctx():
        pass
    adapted = trainer_of(policy(peft_config=LoraConfig(task_type="CAUSAL_LM", r=4)))
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    inputs = torch.arange(5, 9)[None]
    with torch.no_grad(), adapted.optional_peft_ctx():
        assert torch.allclose(adapted.model(inputs)[0], tiny_llama()(inputs).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "totals"),
    [
        ([1.0, -2.0], [1.0, -2.0]),
        ([torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.0, 1.0, 2.0])], [1.5, 3.0]),
        ([torch.tensor(1.0, requires_grad=True) * 2, torch.tensor([3])], [2.0, 3.0]),
        (np.array([1.0, -2.0]), [1.0, -2.0]),
        ([np.float32(1.0), np.array([1.0, 1.0])], [1.0, 2.0]),
        ([[1.0], [0.5, 0.5]], [1.0, 1.0]),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [3.0, 7.0]),
    ],
    ids=["floats", "per token", "with a graph", "array", "arrays", "nested", "tensor"],
)
def test_log_stats_takes_the_scores_that_step_and_the_classic_took(
    rewards: Any, totals: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, logged = _logging_trainer(monkeypatch)
    trainer.log_stats({}, TEXTS, rewards)
    values, _ = logged[0]
    assert values["env/reward_dist"].tolist() == totals
    assert values["env/reward_mean"] == pytest.approx(sum(totals) / 2)


def test_log_stats_names_a_reward_that_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"rewards\[1\] must be a number or one number per response token, got 'good'"):
        trainer_of().log_stats({}, TEXTS, [1.0, "good"])


def test_a_script_that_logs_to_wandb_itself_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases drops a row whose step lies behind its counter: the classic passed one to TensorBoard alone."""
    trainer, logged = _logging_trainer(monkeypatch)
    trainer.config.__dict__["log_with"] = "tensorboard"
    trainer.log_stats({"objective/kl": 1.0}, TEXTS, SCORES)
    trainer.config.__dict__["log_with"] = "wandb"
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=lambda **columns: columns))
    trainer.log_stats({"objective/kl": 1.0}, TEXTS, SCORES)
    assert [step for _, step in logged] == [1, None]
    assert logged[1][0]["game_log"] == {
        "columns": ["query", "response", "reward"],
        "rows": [["a", "c", 1.0], ["b", "d", -1.0]],
    }


def test_with_wandb_the_numbers_of_a_step_have_numpys_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts call `stats["objective/kl"].item()` there; elsewhere the classic returned floats."""
    trainer, _ = _logging_trainer(monkeypatch)
    assert type(trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl"]) is float
    trainer.config.__dict__["log_with"] = "wandb"
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    assert all(isinstance(value, np.ndarray | np.generic) for value in statistics.values())
    assert isinstance(statistics["objective/kl"].item(), float)  # type: ignore[union-attr]


def _logging_trainer(monkeypatch: pytest.MonkeyPatch) -> tuple[PPOTrainer, list[tuple[dict[str, Any], Any]]]:
    """A trainer that logs to TensorBoard, and what it hands to Accelerate: values and step."""
    trainer = trainer_of()
    logged: list[tuple[dict[str, Any], Any]] = []
    writer = SimpleNamespace(add_histogram=lambda *_: None)
    monkeypatch.setattr(trainer.accelerator, "log", lambda values, step: logged.append((dict(values), step)))
    monkeypatch.setattr(trainer.accelerator, "get_tracker", lambda *_, **__: writer)
    return trainer, logged


@dataclass
class OwnConfig(PPOConfig):
    """As scripts extend the classic's."""

    length_penalty: float = 0.5
    """Per token."""


@dataclass
class ScriptArguments:
    """With names that fields of this package have, too."""

    output_dir: str = field(default="out")
    temperature: float = field(default=0.5)
    diagnose: str = field(default="script")


def test_a_dataclass_may_extend_the_configuration() -> None:
    config = OwnConfig(length_penalty=0.1, batch_size=2, mini_batch_size=2, diagnose=False)
    trainer = PPOTrainer(config, policy(), None, tiny_tokenizer())
    trainer.config.length_penalty = 0.2  # type: ignore[attr-defined]
    assert config.length_penalty == 0.2 and config.to_dict()["length_penalty"] == 0.2
    with pytest.raises(AttributeError, match="no setting 'length_penalti'"):
        config.length_penalti = 1.0


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("config_class", [PPOConfig, OwnConfig])
def test_a_scripts_arguments_and_the_configuration_share_a_parser(first: bool, config_class: Any) -> None:
    """`--output_dir` is the script's; a name that both classics had would be refused, as there."""
    types = (ScriptArguments, config_class) if first else (config_class, ScriptArguments)
    arguments = [
        "--output_dir",
        "here",
        "--batch_size",
        "4",
        "--mini_batch_size",
        "4",
        "--tracker_kwargs",
        '{"wandb": {}}',
    ]
    parsed = HfArgumentParser(types).parse_args_into_dataclasses(arguments)
    script, config = parsed if first else parsed[::-1]
    assert (script.output_dir, script.temperature, script.diagnose) == ("here", 0.5, "script")
    assert (config.output_dir, config.temperature, config.batch_size) == (None, 1.0, 4)
    assert config.tracker_kwargs == {"wandb": {}}
    (alone,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(["--output_dir", "there"])
    assert alone.output_dir == "there"


def test_tyro_reads_json_for_the_keyword_fields() -> None:
    tyro = pytest.importorskip("tyro")
    text = json.dumps({"wandb": {"entity": "me"}})
    assert tyro.cli(PPOConfig, args=["--tracker-kwargs", text]).tracker_kwargs == {"wandb": {"entity": "me"}}
    assert tyro.cli(PPOConfig, args=["--seed", "3"]).seed == 3


def test_saving_takes_the_hubs_keywords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of()
    pushed = []
    monkeypatch.setattr(PPOTrainer, "push_to_hub", lambda self, repo_id, **kwargs: pushed.append((repo_id, kwargs)))
    trainer.save_pretrained(tmp_path / "plain", push_to_hub=False)
    assert (tmp_path / "plain" / "config.json").is_file() and pushed == []
    trainer.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    trainer.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="me/repo")
    assert pushed == [("name", {"private": True}), ("me/repo", {})]
    with pytest.raises(ValueError, match="save_pretrained would not read commit_message"):
        trainer.save_pretrained(tmp_path / "never", commit_message="a")
    assert not (tmp_path / "never").exists()


def test_an_upload_is_what_save_pretrained_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folder of a separate critic, which the model itself does not save; the hub is a stand-in."""
    calls: list[Any] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, **settings: Any) -> Any:
            calls.append((repo_id, settings))
            return SimpleNamespace(repo_id="me/" + repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: str, revision: Any, **_: Any) -> None:
            calls.append((repo_id, revision))
            files.extend(path.name for path in Path(folder_path).iterdir())

    files: list[str] = []
    monkeypatch.setattr(surface, "HfApi", Api)
    model = policy()
    attach_critic(model, SeparateCritic.from_policy(model))
    trainer_of(model).push_to_hub("poet", private=True, token="t", branch="best")
    assert calls == ["t", ("poet", {"private": True, "exist_ok": True}), ("me/poet", "best")]
    assert {"critic", "config.json", "model.safetensors", "README.md", "tokenizer_config.json"} <= set(files)


def test_arguments_that_nothing_would_read_are_named() -> None:
    with pytest.warns(UserWarning, match="use_score_norm=True does nothing without use_score_scaling"):
        trainer_of(use_score_norm=True)
    with pytest.warns(UserWarning, match="data_collator is not used"):
        PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=1), policy(), None, tiny_tokenizer(), data_collator=list)


def test_the_doctor_lets_the_prompts_of_an_encoder_decoder_end_in_its_stop_token() -> None:
    """T5's do; a causal model's prompt that ends so is a finding."""
    prompts = [torch.cat([query, torch.tensor([EOS_TOKEN_ID])]) for query in QUERIES]
    t5 = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5())
    found = []
    for model in (t5, policy()):
        trainer = trainer_of(model, diagnose=True)
        trainer.step(prompts, RESPONSES, SCORES)
        assert trainer.diagnosis is not None
        found.append("eos_in_prompt" in {finding.name for finding in trainer.diagnosis.findings})
    assert found == [False, True]


def test_a_reference_of_a_plain_model_is_a_frozen_copy_of_it() -> None:
    model = tiny_gpt2()
    reference = create_reference_model(model)
    assert isinstance(reference, GPT2LMHeadModel) and reference is not model
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert torch.equal(reference.lm_head.weight, model.lm_head.weight)
    shared = create_reference_model(model, num_shared_layers=1)
    assert shared.transformer.h[0].attn.c_attn.weight is model.transformer.h[0].attn.c_attn.weight
    assert not model.transformer.h[0].attn.c_attn.weight.requires_grad
