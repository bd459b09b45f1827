"""What a script assigns to a trainer that is built takes effect at once, or is refused; nothing is ignored silently.

`trainer.model = ...` and the like come here from `ClassicSurface.__setattr__`, `trainer.config.cliprange = ...` and the
like from `PPOConfig.__setattr__`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rlhf_ppo.algorithms.config import critic_settings
from rlhf_ppo.classic.config_changes import change_setting
from rlhf_ppo.learner.arguments import check_models, check_schedule_goes_on, check_scheduler
from rlhf_ppo.learner.config_checks import check_sizes
from rlhf_ppo.learner.optimizer import make_optimizer
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.learner.statistics import Statistics
from rlhf_ppo.models import PreTrainedModelWrapper, prepare_reference_adapter, reference_adapter
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.sampler_reuse import SamplerReuse


class Assignable(PPOLearner):
    """A learner whose attributes and settings can be changed between steps."""

    _is_built = False
    """Whether assignments are those of a script; False inside the constructor."""
    _unmatched_at_first = (0, 0)
    """`_unmatched()` when model and optimizer were put together."""
    _script_context: Callable[[], AbstractContextManager[object]] | None = None
    """The `optional_peft_ctx` that a script assigned."""

    def __setattr__(self, name: str, value: object) -> None:
        if not self._is_built or name not in _ASSIGNMENTS:
            super().__setattr__(name, value)
        elif value is not getattr(self, name) or name == "is_peft_model":  # true of a policy with a reference, too
            _ASSIGNMENTS[name](self, value)

    def follow_assignments(self, *, default_optimizer: bool, default_algorithm: bool) -> None:
        """From now on, assignments to the trainer and its configuration are those of a script.

        Args:
            default_optimizer: Whether the optimizer is the one that the configuration names.
            default_algorithm: Whether the algorithm is that of the configuration's classic fields.
        """
        self.uses_default_optimizer, self.uses_default_algorithm = default_optimizer, default_algorithm
        self._is_own_reference = self.has_reference and not self.has_separate_reference
        self._is_built, self._unmatched_at_first = True, self._unmatched()
        self.config.notify(self._setting_changed)

    def learn(self, responses: Responses) -> Statistics:
        """`PPOLearner.learn`, after a check that what was assigned belongs together."""
        self.check_assignments()
        return super().learn(responses)

    @property
    def has_separate_reference(self) -> bool:
        """Whether the reference is `ref_model`, and not `model` with its adapters off."""
        return self._reference is not None

    @property
    def reference_model(self) -> PreTrainedModelWrapper:
        """`ref_model`, or `model` where it is its own reference while `reference_context` is active."""
        return self.ref_model if self.ref_model is not None and self.has_separate_reference else self.model

    @property
    def optional_peft_ctx(self) -> Callable[[], AbstractContextManager[object]]:
        """Context manager around the reference's passes: adapters off where `model` is its own reference."""
        if self._script_context is not None:
            return self._script_context
        return nullcontext if self.has_separate_reference else partial(reference_adapter, self.model)

    def check_assignments(self) -> None:
        """Check before a step what could not be checked at an assignment, because another one may have followed.

        Raises:
            ValueError: Optimizer, scheduler, model and reference do not belong together, the sizes do not divide, or
                the scheduler has ended.
        """
        check_sizes(self.config)
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        check_schedule_goes_on(scheduler)
        if self.has_reference and not self._is_own_reference and self.ref_model is None:
            raise ValueError(
                "expected a reference model, got trainer.ref_model=None with trainer.is_peft_model=False: there is "
                "nothing to measure the KL to. Assign trainer.ref_model."
            )
        if self.accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            return  # nothing could be assigned, and the optimizer holds shards
        check_models(self.config, self.model, self.ref_model)
        replaced, added = (now - first for now, first in zip(self._unmatched(), self._unmatched_at_first, strict=True))
        if replaced > 0:
            raise ValueError(
                "expected a trainer.model with the tensors that it was built with, got one in which some were replaced "
                "(as `resize_token_embeddings` does): the optimizer would move the old ones. Change the model first, "
                "then build the trainer."
            )
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not any(id(parameter) in known for parameter in trained):
            raise ValueError(
                f"expected an optimizer over the parameters of trainer.model, got one that holds none of its "
                f"{len(trained)} trained tensors: nothing would be learned. Assign "
                "trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), lr=...)."
            )
        if added > 0:
            raise ValueError(
                f"expected the trained parameters that the optimizer was built with, got {added} more, unfrozen or "
                "attached since then (as `attach_critic` does): they would never be learned. Change the model first, "
                "then build the trainer; or assign trainer.optimizer."
            )
        if scheduler is not None and _plain(scheduler.optimizer) is not _plain(self.optimizer):
            raise ValueError(
                "expected an lr_scheduler of trainer.optimizer, got one of another optimizer: the learning rate would "
                "not follow it. Assign trainer.lr_scheduler, too, or None."
            )

    def _unmatched(self) -> tuple[int, int]:
        """How many tensors the optimizer has and the model not, and how many are trained and not in the optimizer."""
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        trained = {id(parameter): parameter.requires_grad for parameter in self.model.parameters()}
        return len(held - trained.keys()), sum(trained[key] for key in trained.keys() - held)

    def _setting_changed(self, name: str) -> None:
        change_setting(self, name)

    @contextmanager
    def rebuilding(self) -> Iterator[None]:
        """Context manager: while active, assignments are the trainer's own; afterwards the rows' order goes on.

        If the block raises, every attribute is put back.
        """
        before, order = dict(vars(self)), self.algorithm.update.state_dict()
        prepared = [list(parts) for parts in self._prepared_parts()]
        self._is_built = False
        try:
            yield
            self.algorithm.update.load_state_dict(order)
            self._is_built = True
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            for parts, former in zip(self._prepared_parts(), prepared, strict=True):
                parts[:] = former
            raise

    def _prepared_parts(self) -> tuple[list[Any], ...]:
        """Accelerate's lists of what it has prepared: it unscales the gradients of every optimizer in them."""
        return self.accelerator._models, self.accelerator._optimizers, self.accelerator._schedulers

    def _forget_prepared(self, *replaced: object) -> None:
        """Take parts that are replaced out of Accelerate's lists, which would keep them."""
        for parts in self._prepared_parts():
            parts[:] = [part for part in parts if all(part is not one for one in replaced)]

    def _replace(self, name: str, part: Any) -> None:
        """Replace `model`, `ref_model`, `optimizer`, ..., and prepare all of them anew."""
        if self.is_distributed or self.accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            raise ValueError(
                f"trainer.{name} cannot be replaced where several processes train: they have wrapped what is there. "
                "Pass it to the constructor of a new trainer."
            )
        check_is_due = self.start_kl_check.is_due
        with self.rebuilding():
            self._forget_prepared(self.policy, self._reference, self.optimizer, self.lr_scheduler)
            setattr(self, name, part)
            self._fitted_budget = None  # the memory that is left for a pass is another
            if name == "model":
                check_is_due, self.is_peft_model = True, part.is_peft_model
                self.reuse = SamplerReuse(self.config.reuse_logprobs, self.processes.reduce_max)  # nothing is proven
            if name in ("model", "ref_model", "is_peft_model"):
                asked = name == "is_peft_model" or self.ref_model is None
                self._is_own_reference = self.has_reference and bool(self.is_peft_model) and asked
            if self._is_own_reference:
                prepare_reference_adapter(self.model)
            scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
            self._prepare(None if self._is_own_reference else self.ref_model, self._present_optimizer(), scheduler)
            context = self._script_context
            if context is not None:
                placement = self.reference_context if self.has_separate_reference else nullcontext
                self.reference_context = partial(_both, placement, context)
            self.start_kl_check.is_due &= check_is_due and context is None
            self._unmatched_at_first = self._unmatched()

    def _present_optimizer(self) -> Optimizer:
        """The optimizer; a default one is built anew if it does not hold all trained parameters of `model`."""
        optimizer: Optimizer = _plain(self.optimizer)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = any(parameter.requires_grad and id(parameter) not in known for parameter in self.model.parameters())
        if not missing or not self.uses_default_optimizer:
            return optimizer
        return make_optimizer(self.model, self.config, None, critic_settings(self.algorithm_config))


def _plain(optimizer: Any) -> Any:
    """An optimizer without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def _both(
    outer: Callable[[], AbstractContextManager[object]], inner: Callable[[], AbstractContextManager[object]]
) -> Iterator[None]:
    with outer(), inner():
        yield


def _set_model(trainer: Assignable, model: Any) -> None:
    model = trainer.accelerator.unwrap_model(model) if isinstance(model, nn.Module) else model
    if model is trainer.model:
        return
    check_models(trainer.config, model, trainer.ref_model)
    if bool(model.is_encoder_decoder) != trainer.is_encoder_decoder:
        raise ValueError(
            f"trainer.model cannot change between a causal model and an encoder-decoder, got {type(model).__name__}: "
            "batches mean something else. Build a new trainer."
        )
    trainer._replace("model", model)


def _set_ref_model(trainer: Assignable, ref_model: Any) -> None:
    check_models(trainer.config, trainer.model, ref_model)
    if ref_model is None and not trainer.model.is_peft_model:
        raise ValueError(
            "trainer.ref_model cannot be None, got a policy without adapters: nothing is left to measure the KL to. "
            "Assign a model; for a copy of the policy, create_reference_model(trainer.model)."
        )
    trainer._replace("ref_model", ref_model)


def _set_is_peft_model(trainer: Assignable, value: Any) -> None:
    if value and not trainer.model.is_peft_model:
        raise ValueError(
            "trainer.is_peft_model=True needs a policy with adapters, got one without: it would be its own reference, "
            "and the KL always 0. Load it with peft_config=LoraConfig(...)."
        )
    trainer._replace("is_peft_model", bool(value))


def _set_context(trainer: Assignable, context: Any) -> None:
    if not callable(context):
        raise ValueError(
            f"optional_peft_ctx must be a function that returns a context manager, got {type(context)}: it is called "
            "around the reference's passes. Assign e.g. contextlib.nullcontext."
        )
    trainer._replace("_script_context", context)


def _set_optimizer(trainer: Assignable, optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer)}: it could take no step.")
    make_optimizer(trainer.model, trainer.config, _plain(optimizer), critic_settings(trainer.algorithm_config))
    trainer.uses_default_optimizer = False
    trainer._replace("optimizer", optimizer)


def _set_scheduler(trainer: Assignable, scheduler: Any) -> None:
    plain = getattr(scheduler, "scheduler", scheduler)
    check_scheduler(plain)
    trainer._forget_prepared(trainer.lr_scheduler)
    vars(trainer)["lr_scheduler"] = None if plain is None else trainer.accelerator.prepare_scheduler(plain)


def _refuse(remedy: str) -> Callable[[Assignable, Any], None]:
    def refuse(trainer: Assignable, value: Any) -> None:
        raise ValueError(
            f"a {type(value).__name__} cannot be assigned here, since the trainer's parts were built with the present "
            f"one and would not follow. {remedy}"
        )

    return refuse


_ASSIGNMENTS: dict[str, Callable[[Assignable, Any], None]] = {
    "model": _set_model,
    "ref_model": _set_ref_model,
    "is_peft_model": _set_is_peft_model,
    "optional_peft_ctx": _set_context,
    "optimizer": _set_optimizer,
    "lr_scheduler": _set_scheduler,
    "config": _refuse("Set the fields of trainer.config, or build a new trainer."),
    "accelerator": _refuse("Pass PPOConfig(accelerator_kwargs=...) to a new trainer."),
    "algorithm_config": _refuse("Pass algorithm=... to a new trainer."),
}
