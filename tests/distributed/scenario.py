"""Three PPO iterations on forced responses of very unequal lengths: on one process here, on several by a launcher.

Run as a script (scenarios as JSON, folder), each process takes its share of the rows and saves what it saw. One start
serves many scenarios, because it takes longer than they do.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_ppo import (
    GRPO,
    GSPO,
    RLOO,
    AdaptiveEntropy,
    AlgorithmConfig,
    AutoModelForCausalLMWithValueHead,
    Critic,
    PositiveNLL,
    PPOClip,
    PPOConfig,
    PPOPenalty,
    PPOTrainer,
    Reinforce,
    TopEntropyTokens,
)
from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.rollout.experience import Responses
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_tokenizer

ITERATIONS = 3
ALGORITHMS: dict[str, AlgorithmConfig | None] = {
    "ppo": None, "penalty": PPOPenalty(target_kl=1e-4), "reinforce": Reinforce(), "rloo": RLOO(), "grpo": GRPO(),
    "gspo": GSPO(), "exact penalty": PPOPenalty(exact=True), "top entropy": PPOClip(tokens=TopEntropyTokens(share=0.5)),
    "further parts": PPOClip(
        positive_nll=PositiveNLL(threshold=4.0), tokens=TopEntropyTokens(share=0.5),
        adaptive_entropy=AdaptiveEntropy(target=9.0, start=0.01), critic=Critic(warmup_iterations=1, extra_fits=1),
    ),
}  # fmt: skip

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One run; the same on any number of processes."""

    shares: tuple[int, ...]
    """Rows of each process."""
    rows_of_a_pass: int = 2
    passes_of_a_step: int = 1
    algorithm: str = "ppo"
    model: str = "llama"
    """Or "gpt2", by plain gradient descent: its key biases have gradient 0, whose rounding Adam would scale up."""
    learning_rate: float = 1e-3
    settings: dict[str, Any] | None = None
    """Further fields of PPOConfig."""
    group_size: int = 1
    sabotage: str | None = None
    """What is made local instead of global: "count" or "whitening"."""
    same_start: bool = False
    """The reference is where the policy starts."""
    broken_row: bool = False
    """The first score is so large that losses overflow."""
    lora: bool = False
    """Train adapters on a frozen base, which is its own reference."""
    mixed_precision: str = "no"
    fsdp: bool = False
    """FSDP2, full shard, though the launch file says DDP."""


@dataclass(kw_only=True)
class Outcome:
    """What one process saw."""

    statistics: list[dict[str, Any]]
    parameters: dict[str, Tensor]
    kl_coef: float
    passes: list[int]
    """Passes over the policy in each optimizer step."""
    parted: int
    """Parameters of policy and reference of which this process holds a part."""


def batch(scenario: Scenario, iteration: int, first: int, count: int) -> Responses:
    """Rows `first` ... `first + count - 1` of the global batch of this iteration."""
    draw = torch.Generator().manual_seed(100 + iteration)
    prompts, responses, scores = [], [], []
    for row in range(sum(scenario.shares)):
        length = 40 if row % 5 == 0 else 1 + row % 4
        prompts.append(torch.randint(2, VOCAB_SIZE, (1 + row % 3,), generator=draw))
        responses.append(torch.randint(2, VOCAB_SIZE, (length,), generator=draw))
        scores.append(torch.randn((), generator=draw) + row)
    if scenario.broken_row:
        scores[0] = torch.tensor(1e25)  # its square is infinite in float32
    own = slice(first, first + count)
    return Responses(
        inputs=TokenInputs(prompts=prompts[own], responses=responses[own]),
        mask=pad_rows([torch.ones(len(response)) for response in responses[own]]).bool(),
        scores=torch.stack(scores[own]),
        group_size=scenario.group_size,
    )


def build(scenario: Scenario) -> PPOTrainer:
    """The trainer, policy and reference of unequal weights."""
    make = tiny_llama if scenario.model == "llama" else tiny_gpt2
    adapters = LORA if scenario.lora else None
    torch.manual_seed(3)  # of the adapters
    policy, reference = (
        AutoModelForCausalLMWithValueHead.from_pretrained(make(seed=seed), peft_config=adapters) for seed in (0, 1)
    )
    for model in (policy, reference):
        torch.nn.init.normal_(model.v_head.summary.weight, std=0.1, generator=torch.Generator().manual_seed(2))
        torch.nn.init.zeros_(model.v_head.summary.bias)
    minibatch = scenario.rows_of_a_pass * scenario.passes_of_a_step
    config = PPOConfig(
        batch_size=4 * minibatch, mini_batch_size=scenario.rows_of_a_pass, ppo_epochs=2,
        gradient_accumulation_steps=scenario.passes_of_a_step, learning_rate=scenario.learning_rate,
        fused_adam=False, accelerator_kwargs={"mixed_precision": scenario.mixed_precision}, **scenario.settings or {},
    )  # fmt: skip
    optimizer = torch.optim.SGD(policy.parameters(), lr=scenario.learning_rate) if scenario.model == "gpt2" else None
    algorithm = ALGORITHMS[scenario.algorithm]
    # Else the base with its adapters off, or a copy.
    other = None if scenario.lora or scenario.same_start else reference
    return PPOTrainer(config, policy, other, tiny_tokenizer(), optimizer=optimizer, algorithm=algorithm)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
"""What `accelerate launch` says to the processes of recipes/launch/fsdp2_cpu.yaml."""


@contextmanager
def fsdp2() -> Iterator[None]:
    """Inside, Accelerators are those of FSDP2; before and after, of DDP. The processes stay connected throughout."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(FSDP2)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)  # it would be said to be alone otherwise
        for name in FSDP2:
            del os.environ[name]


def small_parameters_in_parts() -> None:
    """Let ZeRO-3 share out even the smallest parameters, as all of these models' are; it would leave them whole."""
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":
        return
    from accelerate.utils import DeepSpeedPlugin

    made = DeepSpeedPlugin.__post_init__

    def tuned(plugin: DeepSpeedPlugin) -> None:
        made(plugin)
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = tuned  # type: ignore[method-assign]


def whole_weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Every parameter, gathered where processes hold parts."""
    with trainer.gathered_parameters():
        return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def run(scenario: Scenario) -> Outcome:
    """Three iterations on this process's share of the rows."""
    trainer = build(scenario)
    rank = trainer.accelerator.process_index
    passes = _counted_passes(trainer)
    _sabotage(trainer, scenario.sabotage)
    statistics = []
    for iteration in range(ITERATIONS):
        own = batch(scenario, iteration, sum(scenario.shares[:rank]), scenario.shares[rank])
        statistics.append(trainer.learn(own) | trainer.metrics)
    return Outcome(
        statistics=statistics,
        parameters=whole_weights(trainer),
        kl_coef=trainer.kl_ctl.value,
        passes=passes,
        parted=sum(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in _parameters(trainer)),
    )


def _parameters(trainer: PPOTrainer) -> list[Tensor]:
    models = (trainer.model, trainer.ref_model)
    return [parameter for model in models if model is not None for parameter in model.parameters()]


def _counted_passes(trainer: PPOTrainer) -> list[int]:
    """Of each optimizer step, kept up to date while the trainer runs."""
    update: Any = trainer.algorithm.update
    while hasattr(update, "inner") and not hasattr(update, "_backward"):
        update = update.inner
    passes: list[int] = []
    backward, step = update._backward, update._step

    def counted_backward(*arguments: Any, **settings: Any) -> Any:
        passes[-1] += 1
        return backward(*arguments, **settings)

    def counted_step(*arguments: Any) -> None:
        passes.append(0)
        step(*arguments)

    update._backward, update._step = counted_backward, counted_step
    return passes


def _sabotage(trainer: PPOTrainer, what: str | None) -> None:
    """The classic mistakes of data-parallel PPO, for tests that must notice them."""
    if what == "whitening":
        trainer.processes.reduce_sum = lambda tensor: tensor  # type: ignore[method-assign]
    if what == "count":
        update: Any = trainer.algorithm.update
        objective, processes = update.objective, trainer.accelerator.num_processes
        update.objective = lambda output, piece, count: objective(
            output, piece, (piece.mask.sum() * processes).clamp(min=1)
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    small_parameters_in_parts()
    for number, wished in enumerate(json.loads(sys.argv[1])):
        print(f"scenario {number}: {wished}", flush=True)
        scenario = Scenario(**{**wished, "shares": tuple(wished["shares"])})
        with fsdp2() if scenario.fsdp else nullcontext():
            outcome = run(scenario)
        torch.save(asdict(outcome), Path(sys.argv[2]) / f"{number}-{PartialState().process_index}.pt")
    PartialState().destroy_process_group()
