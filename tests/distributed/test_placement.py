"""Frozen models wait where they are told to, and compute what they would compute anywhere else."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.diagnostics.environment_checks import ENVIRONMENT_CHECKS
from rlhf_ppo.distributed import placement
from rlhf_ppo.distributed.placement import OffloadedWeights
from rlhf_ppo.rewards.offload import offload_sources
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were brought to the device are others than those that wait, as they are with a GPU."""
    monkeypatch.setattr(placement, "to_device", lambda weights, device: weights.clone())


def places(module: nn.Module) -> list[int]:
    """Where the weights are in memory."""
    return [value.data_ptr() for value in (*module.parameters(), *module.buffers())]


def test_weights_wait_in_main_memory_and_are_on_the_device_while_at_hand() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    waiting, home = OffloadedWeights(module, CPU), places(module)
    for _ in range(2):
        with waiting.on_device():
            assert not set(places(module)) & set(home)
        assert places(module) == home, "nothing is copied on the way back"
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_error_in_between_leaves_the_weights_waiting() -> None:
    module = nn.Linear(2, 3)
    waiting, home = OffloadedWeights(module, CPU), places(module)
    with pytest.raises(RuntimeError, match="lost"), waiting.on_device():
        raise RuntimeError("lost")
    assert places(module) == home


def test_layers_shared_with_the_policy_stay_where_they_are() -> None:
    shared, own = nn.Linear(2, 2), nn.Linear(2, 2)
    waiting, home = OffloadedWeights(nn.Sequential(shared, own), CPU, excluded=shared.parameters()), places(own)
    before = places(shared)
    with waiting.on_device():
        assert places(shared) == before
        assert places(own) != home


class Judge:
    """A reward source with a model, which notes where that is when it is asked."""

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
        self.seen.append(places(self.model))
        return [float(len(response)) for response in responses]


def trainer(**settings: Any) -> PPOTrainer:
    """A tiny one with prompts."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(n_layer=1, n_embd=8, n_head=1))
    sizes: dict[str, Any] = {"batch_size": 2, "mini_batch_size": 2, "ppo_epochs": 1, "diagnose": False}
    config = PPOConfig(learning_rate=1e-3, **sizes | settings)
    return PPOTrainer(config, model, tokenizer=tokenizer, dataset=PromptDataset.from_texts(["I", "We"], tokenizer))


def test_reward_models_wait_between_questions_and_come_home_after_the_run() -> None:
    judge, waiting = Judge(), []
    sampling = SamplingConfig(max_new_tokens=2)
    config = TrainConfig(iterations=2, sampling=sampling, offload_rewards=True, progress=False)
    trainer().train(judge, config, callbacks=[lambda *_: waiting.append(places(judge.model))])
    assert waiting[0] == waiting[1], "the same memory waits"
    assert waiting[0] not in judge.seen
    assert places(judge.model) != waiting[0]


def test_the_doctor_asks_reward_models_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, asked = Judge(), []
    monkeypatch.setitem(ENVIRONMENT_CHECKS, "probe", lambda *_: asked.append(places(judge.model)) or [])
    config = TrainConfig(iterations=1, sampling=SamplingConfig(max_new_tokens=2), offload_rewards=True, progress=False)
    waiting: list[list[int]] = []
    trainer(diagnose=True).train(judge, config, callbacks=[lambda *_: waiting.append(places(judge.model))])
    assert len(asked) == 1 and asked != waiting


def test_an_evaluation_in_a_callback_scores_with_reward_models_on_their_device() -> None:
    judge, waiting, own = Judge(), [], trainer()
    sampling = SamplingConfig(max_new_tokens=2)
    config = TrainConfig(iterations=1, sampling=sampling, offload_rewards=True, progress=False)

    def evaluate(*_: object) -> None:
        waiting.append(places(judge.model))
        own.evaluate(own.dataset, judge, sampling)  # type: ignore[arg-type]

    own.train(judge, config, callbacks=[evaluate])
    assert len(judge.seen) == 2
    assert waiting[0] not in judge.seen
    own.evaluate(own.dataset, judge, sampling)  # type: ignore[arg-type]
    assert judge.seen[2] == places(judge.model), "after the run nothing is moved"


def test_members_of_an_ensemble_and_parts_of_a_model_wait_too_but_not_the_policy() -> None:
    body, policy = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), nn.Linear(1, 1)
    members = [SimpleNamespace(model=nn.Linear(1, 1)), SimpleNamespace(model=policy)]
    source = Judge()
    source.__dict__ |= {"model": body, "head": body[1], "members": members}
    home, kept = places(nn.ModuleList([body, members[0].model])), places(policy)
    with offload_sources(source, excluded=policy.parameters()) as on_device:
        with on_device():
            assert not set(places(nn.ModuleList([body, members[0].model]))) & set(home)
        assert places(nn.ModuleList([body, members[0].model])) == home
        assert places(policy) == kept


def test_the_device_of_a_part_is_read_before_the_whole_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    body, seen = nn.Sequential(nn.Linear(2, 1)), list[torch.device]()

    def moved(module: nn.Module, device: torch.device, **_: Any) -> Any:
        seen.append(device)
        module.to("meta")  # another device
        return SimpleNamespace(tensors=[], load=lambda: None)

    monkeypatch.setattr("rlhf_ppo.rewards.offload.OffloadedWeights", moved)
    source = Judge()
    source.__dict__ |= {"model": body, "head": body[0]}
    with offload_sources(source):
        assert seen == [CPU, CPU]


def test_a_source_without_a_model_to_offload_is_named_by_a_warning() -> None:
    with pytest.warns(UserWarning, match="nothing is moved"), offload_sources(lambda **_: [0.0]):
        pass


def test_an_offloaded_reference_gives_the_steps_of_one_at_hand() -> None:
    """On a CPU both are main memory: the same numbers, whichever way they went."""
    queries, responses = [torch.tensor([5, 6])] * 2, [torch.tensor([8, 9]), torch.tensor([10, 7, 7])]
    found = []
    for where in ("whole", "offloaded"):
        stepped = trainer(reference_placement=where)
        for _ in range(2):
            statistics = stepped.step(queries, responses, [torch.tensor(1.0), torch.tensor(-1.0)])
        found.append((statistics["objective/kl"], stepped.model.v_head.summary.weight.detach()))
    assert found[0][0] == found[1][0] != 0.0
    assert torch.equal(found[0][1], found[1][1])


def test_what_cannot_be_placed_so_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"sharded' needs ZeRO-3 or FSDP.*fsdp2\.yaml"):
        trainer(reference_placement="sharded")
    with pytest.raises(ValueError, match=r"keeps the reference off the device during the update.*mse"):
        trainer(reference_placement="offloaded", kl_penalty="full", kl_placement="loss")
    with pytest.raises(ValueError, match="kl_penalty='full' with kl_placement='split' reads it in every pass"):
        trainer(reference_placement="offloaded", kl_penalty="full", kl_placement="split")
