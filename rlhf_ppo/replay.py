"""Replay a failed optimizer step from its dump: `python -m rlhf_ppo.replay DUMP`.

A run that stops because losses or gradients are not finite leaves a dump (`PPOConfig.dump_dir`). This loads its weights
and batch, recomputes the failed step, and reports whether it is reproduced, and which samples and parameters are not
finite.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Result of a replay."""

    recorded: dict[str, float]
    """Metrics that the run recorded."""
    metrics: dict[str, float]
    """The same metrics, recomputed."""
    broken_gradients: list[str]
    """Parameters whose gradient is not finite."""
    broken_parameters: list[str]
    """Parameters that are not finite themselves."""
    samples: list[int]
    """Rows of the batch whose loss or gradient alone is not finite."""
    lacks_texts: bool = False
    """Whether the step also learned pretraining texts, which a dump does not hold."""

    @property
    def is_reproduced(self) -> bool:
        """Whether loss and gradient norm match the recorded ones: both not finite, or equal up to rounding."""
        names = ("loss/total", "policy/grad_norm")
        return all(_matches(self.recorded[name], self.metrics[name]) for name in names)

    def __str__(self) -> str:
        lines = [f"{'metric':<24} {'recorded':>14} {'computed again':>14}"]
        lines += [
            f"{name:<24} {self.recorded[name]:>14.6g} {self.metrics[name]:>14.6g}" for name in sorted(self.recorded)
        ]
        lines.append(f"samples that are not finite by themselves: {self.samples or 'none'}")
        lines.append(f"parameters with such a gradient: {', '.join(self.broken_gradients[:5]) or 'none'}")
        lines.append(f"parameters that are not finite: {', '.join(self.broken_parameters[:5]) or 'none'}")
        lines += ["recomputed without the step's pretraining texts, which are not in the dump"] * self.lacks_texts
        return "\n".join([*lines, "reproduced" if self.is_reproduced else "NOT reproduced"])


def replay(folder: str | Path, model: Any = None) -> Replay:
    """Recompute the failed optimizer step of a dump in one process, without changing any weight.

    Args:
        model: Model with value head to use; None: load it from the dump. Needed if the dump holds adapters whose base
            model cannot be found by its name.

    Raises:
        ValueError: There is no dump, it is of another format, or a part of the update is not in it.
    """
    import torch  # here, so that the help comes without it
    from accelerate import Accelerator

    from rlhf_ppo.algorithms import build_algorithm
    from rlhf_ppo.diagnostics.dump import MODEL, dumped_algorithm, read_batch, read_facts
    from rlhf_ppo.learner.finite_checks import nonfinite_parameters
    from rlhf_ppo.models.dropout import disable_dropout
    from rlhf_ppo.models.scoring import TokenPolicy
    from rlhf_ppo.updates import MinibatchConfig
    from rlhf_ppo.updates.nonfinite import innermost_update

    folder = Path(folder)
    record = read_facts(folder)
    model = _load_model(folder / MODEL, record) if model is None else model
    policy = TokenPolicy(model, **record["scoring"])
    if record["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        disable_dropout(model)
        policy.checkpointing = True
    accelerator = Accelerator(mixed_precision=record["mixed_precision"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    policy, optimizer = accelerator.prepare(policy, torch.optim.SGD(parameters, lr=0.0))
    update = build_algorithm(
        dumped_algorithm(record["algorithm"]), policy=policy, optimizer=optimizer, accelerator=accelerator,
        minibatch_config=lambda: MinibatchConfig(**record["minibatch"]), seed=0,
        reference_kl=record.get("reference_kl"),
    ).update  # fmt: skip
    has_texts = "texts" in record["update"]
    update.load_state_dict(record["update"]["update"] if has_texts else record["update"])
    batch = read_batch(folder).to(accelerator.device)
    rows = torch.tensor(record["rows"], device=accelerator.device)
    update_rule = innermost_update(update)
    all_rows = update_rule.dry_run(batch, rows)
    broken_rows = [row for row in record["rows"] if not update_rule.dry_run(batch, torch.tensor([row])).is_finite]
    return Replay(
        recorded={name: float(value) for name, value in record["metrics"].items() if name in all_rows.metrics},
        metrics=all_rows.metrics, broken_gradients=all_rows.nonfinite_gradients,
        broken_parameters=nonfinite_parameters(model), samples=broken_rows, lacks_texts=has_texts,
    )  # fmt: skip


def _load_model(folder: Path, record: dict[str, Any]) -> Any:
    import torch

    from rlhf_ppo.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

    kind = AutoModelForSeq2SeqLMWithValueHead if record["is_encoder_decoder"] else AutoModelForCausalLMWithValueHead
    options: dict[str, Any] = {"is_trainable": True} if (folder / "adapter_config.json").is_file() else {}
    return kind.from_pretrained(str(folder), dtype=getattr(torch, record["dtype"]), **options)


def main(arguments: list[str] | None = None) -> int:
    """Print the replay; exit status 0 if it reproduces the run, 1 if not, 2 for an unreadable dump."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_ppo.replay", description=__doc__)
    parser.add_argument("dump", type=Path, help="folder named by the error message")
    try:
        result = replay(parser.parse_args(arguments).dump)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(result)  # noqa: T201
    return 0 if result.is_reproduced else 1


def _matches(recorded: float, computed: float) -> bool:
    if math.isnan(recorded) or math.isinf(recorded):
        return not math.isfinite(computed)
    return math.isclose(recorded, computed, rel_tol=1e-4, abs_tol=1e-6)


if __name__ == "__main__":
    sys.exit(main())
