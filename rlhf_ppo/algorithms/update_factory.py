"""Create objectives and updates for one policy, optimizer and accelerator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ppo.algorithms.config import TRPO, Critic
from rlhf_ppo.algorithms.objectives import PolicyTerm, surrogate, total_objective, with_reference_kl
from rlhf_ppo.algorithms.surrogate_config import ClipCovariance, TopEntropyTokens
from rlhf_ppo.algorithms.token_selection import TokenSelectionUpdate
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.functional import ReferenceKL
from rlhf_ppo.updates import (
    CompareWith,
    CriticFit,
    GradientFunction,
    MinibatchConfig,
    MinibatchUpdate,
    Objective,
    TrustRegionUpdate,
    Update,
)
from rlhf_ppo.updates.objective import count_actions
from rlhf_ppo.updates.pretraining import PretrainingGradients, PretrainingRows
from rlhf_ppo.updates.shuffle import Shuffle


@dataclass(frozen=True, kw_only=True)
class UpdateFactory:
    """Creates objectives and updates that share policy, optimizer, accelerator and the KL in the loss."""

    policy: nn.Module
    """The prepared policy."""
    optimizer: Optimizer
    """Its prepared optimizer."""
    accelerator: Accelerator
    minibatch_config: Callable[[], MinibatchConfig]
    seed: int
    reference_kl: ReferenceKL | None = None
    """Kind of KL to the reference in the loss; None: no KL."""
    reference: nn.Module | None = None
    """The frozen reference, used by `reference_kl="full"`."""
    pretraining: PretrainingRows | None = None
    """Draws the texts that every optimizer step also learns; None: none."""
    compute_gradients: GradientFunction | None = None
    """Replaces autograd in minibatch updates and critic fits; None: autograd."""

    def __post_init__(self) -> None:
        if self.reference_kl != "full":
            return
        if self.reference is None:
            raise ValueError(
                "the full KL to the reference in the loss needs both distributions of a token at once, but the "
                "reference is the policy with its adapters off. Pass a separate `ref_model`, or use kl_penalty='mse' "
                "(k2), which has the same gradient on average."
            )
        if self.processes.sharded:
            raise ValueError(
                f"the full KL to the reference in the loss does not run under {self.accelerator.distributed_type}: "
                "its pass reads parameters that the policy's pass has released. Use kl_penalty='mse' (k2), which has "
                "the same gradient on average."
            )

    @property
    def module(self) -> Any:
        """The policy without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.policy)

    @property
    def processes(self) -> Processes:
        return Processes(self.accelerator)

    @property
    def reduce_sum(self) -> Callable[[Tensor], Tensor]:
        return self.processes.reduce_sum

    def total_objective(self, term: PolicyTerm, *, critic: Critic | None, ent_coef: float, **clip: float) -> Objective:
        """The total objective of a policy term, with the KL to the reference if `reference_kl` is set."""
        return total_objective(with_reference_kl(term, self.reference_kl), critic=critic, ent_coef=ent_coef, **clip)

    def update(
        self,
        objective: Objective,
        *,
        config: Callable[[], MinibatchConfig] | None = None,
        compare_with: CompareWith | None = None,
        count: Callable[[Tensor], Tensor] = count_actions,
    ) -> MinibatchUpdate:
        def compare(batch: TrainBatch) -> dict[str, Any]:
            extra = {} if compare_with is None else compare_with(batch)
            return extra | self.reference_argument(batch)

        update = MinibatchUpdate(
            policy=self.policy, optimizer=self.optimizer, accelerator=self.accelerator, objective=objective,
            config=config or self.minibatch_config, seed=self.seed, compare_with=compare, count=count,
            compute_gradients=self.compute_gradients,
        )  # fmt: skip
        if self.pretraining is not None:
            if self.pretraining.mix.rows % self.accelerator.num_processes:
                raise ValueError(
                    f"PretrainingMix.rows must be a multiple of the {self.accelerator.num_processes} processes, got "
                    f"{self.pretraining.mix.rows}: they would make different numbers of passes. Use a multiple."
                )
            update.compute_gradients = PretrainingGradients(update, self.pretraining)
        return update

    def reference_argument(self, batch: TrainBatch) -> dict[str, Any]:
        """The policy's argument `reference` if the loss needs the full reference distribution, else {}."""
        if self.reference_kl != "full" or self.reference is None:
            return {}
        return {"reference": self.accelerator.unwrap_model(self.reference)}

    def critic_fit(self, clip_range_value: float | None) -> CriticFit:
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"warmup_iterations and extra_fits do not run under {self.accelerator.distributed_type}: the critic is "
                "fitted outside of the engine that holds its parameters. Use one process or DDP, or set both to 0."
            )
        return CriticFit(
            policy=self.module, optimizer=self.optimizer, accelerator=self.accelerator, config=self.minibatch_config,
            shuffle=Shuffle(self.seed), clip_range_value=clip_range_value, compute_gradients=self.compute_gradients,
        )  # fmt: skip

    def select_tokens(self, update: Update, config: TopEntropyTokens | ClipCovariance) -> TokenSelectionUpdate:
        """The same update on a selection of tokens."""
        if self.processes.sharded and isinstance(config, TopEntropyTokens):
            raise ValueError(
                f"TopEntropyTokens does not run under {self.accelerator.distributed_type}: its pass over a process's "
                "own rows would wait for parameters of the others. Use DDP or one process, or ClipCovariance."
            )
        return TokenSelectionUpdate(
            update, config, policy=self.module, processes=self.processes, minibatch_config=self.minibatch_config,
            seed=self.seed,
        )  # fmt: skip

    def trust_region_update(self, config: TRPO) -> TrustRegionUpdate:
        if self.pretraining is not None:
            raise ValueError(
                "pretraining texts are mixed into minibatch steps, which TRPO does not take: its natural gradient "
                "would not contain them. Use another algorithm, or leave them out."
            )
        return TrustRegionUpdate(
            policy=self.policy, optimizer=self.optimizer, accelerator=self.accelerator, config=self.minibatch_config,
            seed=self.seed, clip_range_value=config.clip_range_value, compare_with=self.reference_argument,
            objective=self.total_objective(surrogate, critic=None, ent_coef=config.ent_coef), region=config,
            compute_gradients=self.compute_gradients,
        )  # fmt: skip
