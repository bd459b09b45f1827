"""A run of N iterations and one of k, stopped and resumed to N, are the same run: weights, metrics, samples."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig
from torch.optim.lr_scheduler import LinearLR, LRScheduler
from transformers import Adafactor

from rlhf_ppo import (
    GRPO,
    AlgorithmConfig,
    AutoModelForCausalLMWithValueHead,
    Critic,
    LearnedValue,
    MovingMean,
    PPOClip,
    PPOConfig,
    PPOTrainer,
    Reinforce,
    TrainConfig,
)
from rlhf_ppo.checkpoints import restore_checkpoint, save_checkpoint
from rlhf_ppo.checkpoints.folders import MANIFEST, CheckpointError, list_checkpoints, read_json, write_json
from rlhf_ppo.checkpoints.nested_state import load_nested_state, save_nested_state
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.updates.optimizers import linear_to_zero
from tests.robustness.old_format import as_format_1
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer
from tests.support.tiny_run import TEXTS, config, parameters, share_of_e, trainer

PAIRS = SamplingConfig(max_new_tokens=6, num_return_sequences=2)


class Diary:
    """A reward source that keeps what it was shown, and whose rewards depend on how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.texts: list[str] = []

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
        self.calls += 1
        self.texts += responses
        return [0.01 * self.calls + response.count("e") / max(1, len(response)) for response in responses]

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def compare(build: Callable[[], PPOTrainer], folder: Path, **settings: Any) -> None:
    """Four iterations at once; two, and two more by another trainer from the checkpoint."""

    def train(diary: Diary, name: str, seed: int, stop_at: int | None = None) -> PPOTrainer:
        torch.manual_seed(seed)  # of the value head, and of whatever draws from the global stream
        own = build()
        wishes = {"iterations": 4, "sampling": PAIRS, "progress": False, "output_dir": str(folder / name), **settings}
        own.train(diary, TrainConfig(**wishes), callbacks=[lambda _, state: state.iteration == stop_at])
        return own

    whole, first, second = Diary(), Diary(), Diary()
    expected = train(whole, "whole", seed=5)
    train(first, "resumed", seed=5, stop_at=2)
    resumed = train(second, "resumed", seed=6)
    assert torch.equal(parameters(resumed), parameters(expected))
    assert first.texts + second.texts == whole.texts
    assert untimed(folder / "resumed") == untimed(folder / "whole")


def untimed(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in RunFolder.open(folder).metrics()
    ]


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(algorithm, marks=() if isinstance(algorithm, GRPO) else pytest.mark.slow)
        for algorithm in (
            *(kind() for kind in get_args(AlgorithmConfig)),
            Reinforce(baseline=LearnedValue()),
            Reinforce(baseline=MovingMean()),
            PPOClip(critic=Critic(warmup_iterations=3)),
        )
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_resumed_equals_uninterrupted_bit_for_bit_with_every_algorithm(
    algorithm: AlgorithmConfig, tmp_path: Path
) -> None:
    compare(lambda: trainer(algorithm=algorithm), tmp_path)


def build_with_everything() -> PPOTrainer:
    """LoRA, a schedule, running moments, an adaptive controller, whitening, dropout in the adapters."""
    tokenizer = tiny_tokenizer()
    adapters = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.1, fan_in_fan_out=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0), peft_config=adapters)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, amsgrad=True)
    settings = PPOConfig(
        batch_size=8, mini_batch_size=4, ppo_epochs=2, horizon=50, target=0.05, whiten_rewards=True,
        use_score_scaling=True, use_score_norm=True, score_clip=2.0, max_grad_norm=1.0,
    )  # fmt: skip
    return PPOTrainer(
        settings, model, tokenizer=tokenizer, dataset=PromptDataset.from_texts(TEXTS, tokenizer),
        optimizer=optimizer, lr_scheduler=LinearLR(optimizer, total_iters=4),
    )  # fmt: skip


def test_resumed_equals_uninterrupted_with_lora_a_schedule_and_running_moments(tmp_path: Path) -> None:
    compare(build_with_everything, tmp_path)


@pytest.mark.slow
def test_the_best_so_far_and_the_frontier_survive_a_resume(tmp_path: Path) -> None:
    """Else the first model evaluated after a resume would count as the best."""
    settings: dict[str, Any] = {"eval_every": 1, "keep_best": "score", "keep_frontier": 2}
    found = {}
    for name, stop_at in (("whole", None), ("resumed", 2), ("resumed", None)):
        own = trainer()
        held_out = PromptDataset.from_texts(TEXTS, own.tokenizer)
        state = own.train(
            share_of_e, config(tmp_path / name, **settings), eval_prompts=held_out,
            callbacks=[lambda _, state, stop_at=stop_at: state.iteration == stop_at],
        )  # fmt: skip
        found[name] = (state.best, read_json(tmp_path / name / "frontier.json"))
    assert found["resumed"] == found["whole"]
    assert len(found["whole"][1]["evaluations"]) == 4


def test_changed_settings_are_named_when_a_run_goes_on_with_them(tmp_path: Path) -> None:
    trainer().train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    with pytest.warns(UserWarning, match=r"other settings: ppo_epochs=3 \(was 2\)"):
        trainer(ppo_epochs=3).train(share_of_e, config(tmp_path, iterations=2))


def test_changed_settings_that_the_saved_state_overrules_are_named_as_such(tmp_path: Path) -> None:
    trainer().train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    own = trainer(init_kl_coef=0.7, adam_eps=1e-3, optimizer="adamw", ppo_epochs=3)
    with pytest.warns(
        UserWarning, match=r"new values, except for adam_eps, init_kl_coef, optimizer, whose saved"
    ) as said:
        own.train(share_of_e, config(tmp_path, iterations=1))
    assert "ppo_epochs=3 (was 2)" in str(said[0].message)
    assert own.kl_ctl.value < 0.21
    assert [own.optimizer.param_groups[0][name] for name in ("eps", "weight_decay")] == [1e-8, 0.0]


def test_another_kind_of_optimizer_is_refused_and_nothing_has_changed(tmp_path: Path) -> None:
    """Adam has a weight decay, TensorFlow's has none: with the saved groups its first step would be a KeyError."""
    trainer(optimizer="adam_tensorflow").train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    own = trainer()
    before = parameters(own).clone()
    with pytest.raises(
        CheckpointError, match=r"the settings betas, eps, lr, this run's has betas, eps, lr, weight_decay"
    ):
        own.train(share_of_e, config(tmp_path, iterations=2))
    assert torch.equal(before, parameters(own))


def test_an_optimizer_may_count_its_steps_in_its_groups(tmp_path: Path) -> None:
    """As apex's FusedAdam does from its first step on: a fresh one has no such entry."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
            return super().step(closure)

    for iterations in (1, 2):
        own = trainer()
        own.optimizer = Counting(own.model.parameters(), lr=0.1)
        own.train(share_of_e, config(tmp_path, iterations=iterations, save_every=1))
    assert own.optimizer.param_groups[0]["step"] == 8


def test_the_loss_scale_of_float16_is_saved(tmp_path: Path) -> None:
    first, second = trainer(), trainer()
    for own, scale in ((first, 8.0), (second, 65536.0)):
        own.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    save_checkpoint(first, tmp_path, iteration=1)
    restore_checkpoint(second, tmp_path)
    assert second.accelerator.scaler.get_scale() == 8.0


def test_a_reference_of_other_weights_is_refused(tmp_path: Path) -> None:
    """Who starts from the trained model instead of the first one would measure the KL from there."""
    trainer().train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    own = trainer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=3))
    other = PPOTrainer(own.config, model, tokenizer=own.tokenizer, dataset=own.dataset)
    before = parameters(other).clone()
    with pytest.raises(CheckpointError, match="other frozen weights"):
        other.train(share_of_e, config(tmp_path, iterations=2))
    assert torch.equal(parameters(other), before)


@pytest.mark.parametrize(
    ("texts", "message"), [(TEXTS[:3], "length 4, this run has 3"), ([*TEXTS[:3], "Another"], "checksum")]
)
def test_other_prompts_are_refused_and_nothing_has_changed(texts: list[str], message: str, tmp_path: Path) -> None:
    trainer().train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    own = trainer()
    before, coefficient = parameters(own).clone(), own.kl_ctl.value
    others = PromptDataset.from_texts(texts, own.tokenizer)
    with pytest.raises(CheckpointError, match=f"The saved prompt order has {message}"):
        own.train(share_of_e, config(tmp_path, iterations=2), prompts=others)
    assert torch.equal(parameters(own), before)
    assert own.kl_ctl.value == coefficient


def test_resume_false_leaves_no_checkpoint_of_the_run_before_it_to_go_on_from(tmp_path: Path) -> None:
    trainer().train(share_of_e, config(tmp_path, iterations=3, save_every=1))
    trainer().train(share_of_e, config(tmp_path, iterations=1, save_every=1, resume=False))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_starts_anew_sets_the_records_of_the_one_before_aside(resume: bool, tmp_path: Path) -> None:
    """Without a checkpoint there is nothing to go on from; the first run's lines would stand behind the second's."""
    for iterations in (3, 1):
        trainer().train(share_of_e, config(tmp_path, iterations=iterations, resume=resume))
    lines = [len((tmp_path / name).read_text().splitlines()) for name in ("metrics.jsonl", "metrics.1.jsonl")]
    assert lines == [1, 3]
    assert [row["iteration"] for row in RunFolder.open(tmp_path).metrics()] == [1]


@pytest.mark.slow
def scheduled(schedule: Callable[[torch.optim.Optimizer], LRScheduler]) -> PPOTrainer:
    own = trainer()
    own.lr_scheduler = schedule(own.optimizer)
    return own


def test_a_resumed_run_of_more_iterations_follows_its_own_longer_schedule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two iterations anneal the rate to 0; after them, four have half of it left: 1 - 2/4, then 1 - 3/4."""
    short = scheduled(lambda optimizer: linear_to_zero(optimizer, 2))
    short.train(share_of_e, config(tmp_path, iterations=2, save_every=1))
    assert not caplog.messages
    longer = scheduled(lambda optimizer: linear_to_zero(optimizer, 4))
    history = longer.train(share_of_e, config(tmp_path, iterations=4)).history
    assert [row["ppo/learning_rate"] for row in history] == pytest.approx([1e-3 / 2, 1e-3 / 4])
    assert "its learning rate after 2 iterations is 0.0005 (was 0)" in "".join(caplog.messages)


def test_the_saved_settings_of_a_schedule_of_torch_s_are_said_to_go_on(tmp_path: Path) -> None:
    short = scheduled(lambda optimizer: LinearLR(optimizer, total_iters=2))
    short.train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    longer = scheduled(lambda optimizer: LinearLR(optimizer, total_iters=4))
    message = r"lr_scheduler.total_iters=4 \(was 2\). The run uses the new values, except for lr_scheduler.total_iters"
    with pytest.warns(UserWarning, match=message):
        longer.train(share_of_e, config(tmp_path, iterations=2))


@pytest.mark.filterwarnings("ignore:checkpoint-2 was written with other settings")
def test_a_checkpoint_of_format_1_is_read_and_goes_on_exactly(tmp_path: Path) -> None:
    """Earlier versions pickled the optimizer and kept the rest in one JSON file, and knew nothing of reuse."""
    folder = tmp_path / "old"
    torch.manual_seed(0)
    whole = trainer(reuse_logprobs=False)
    whole.train(share_of_e, config(iterations=4))
    torch.manual_seed(0)
    trainer(reuse_logprobs=False).train(share_of_e, config(folder, iterations=2, save_every=1))
    for path in list_checkpoints(folder):
        as_format_1(path)
    resumed = trainer(reuse_logprobs=False)
    resumed.train(share_of_e, config(folder, iterations=4, save_every=2))
    assert torch.equal(parameters(resumed), parameters(whole))


def test_a_checkpoint_of_a_newer_format_is_refused_and_none_older_is_used_instead(tmp_path: Path) -> None:
    trainer().train(share_of_e, config(tmp_path, iterations=2, save_every=1))
    path = tmp_path / "checkpoint-2" / MANIFEST
    content = {"format": 3, "files": read_json(path)["files"]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content | {"sha256": digest}))
    with pytest.raises(CheckpointError, match="checkpoint-2 has format 3, this version of rlhf_ppo reads 1 to 2"):
        trainer().train(share_of_e, config(tmp_path, iterations=3))


def test_a_run_of_two_processes_goes_on_with_one_and_says_what_is_not_exact(tmp_path: Path) -> None:
    """Weights and optimizer are those of the checkpoint; samples are new ones, the same in every such resume."""
    torch.manual_seed(0)
    first = trainer()
    first.train(share_of_e, config(tmp_path / "run", iterations=2, save_every=2))
    folder = tmp_path / "run" / "checkpoint-2"
    (own,) = load_nested_state(folder / "processes.safetensors")
    save_nested_state([own, own], folder / "processes.safetensors")
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != MANIFEST}
    content = {"format": 2, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    write_json(folder / MANIFEST, content | {"sha256": digest})
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    ends = []
    for name in ("run", "again"):
        resumed = trainer()
        with pytest.warns(UserWarning, match=r"written by 2 process\(es\), this run has 1\. Weights"):
            resumed.train(share_of_e, config(tmp_path / name, iterations=2))
        assert torch.equal(parameters(resumed), parameters(first))
        with pytest.warns(UserWarning, match="random streams are reseeded"):
            resumed.train(share_of_e, config(tmp_path / name, iterations=3))
        ends.append(parameters(resumed))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], parameters(first))


@pytest.mark.parametrize("kind", [Adafactor, torch.optim.Adafactor])
def test_a_run_with_an_optimizer_of_factored_moments_goes_on_exactly(kind: Any, tmp_path: Path) -> None:
    """A matrix has a moment for each row and column. transformers's Adafactor finds its own rate."""

    def build() -> PPOTrainer:
        own = trainer()
        own.optimizer = kind(own.model.parameters())
        return own

    compare(build, tmp_path)
