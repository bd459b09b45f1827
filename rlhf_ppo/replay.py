"""Compute an update again that was refused: `python -m rlhf_ppo.replay DUMP`.

A run that stops because losses or gradients are not finite leaves a dump (`PPOConfig.dump_dir`). This loads its weights
and its batch, computes the refused optimizer step again, says whether it comes out the same, and which sample and
which parameters are to blame.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rlhf_ppo.algorithms import build_algorithm
from rlhf_ppo.diagnostics.dump import FACTS, FORMAT, MODEL, dumped_algorithm, read_batch
from rlhf_ppo.learner.finite_checks import broken_parameters
from rlhf_ppo.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.updates import MinibatchConfig
from rlhf_ppo.updates.nonfinite import innermost_update


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came out."""

    recorded: dict[str, float]
    """What the run measured."""
    metrics: dict[str, float]
    """The same numbers, computed again."""
    broken_gradients: list[str]
    """Parameters whose gradient is not finite."""
    broken_parameters: list[str]
    """Parameters that are not finite themselves."""
    samples: list[int]
    """Rows of the batch that are not finite by themselves."""

    @property
    def is_reproduced(self) -> bool:
        """Whether loss and gradient norm are what the run saw: not finite in the same way, or equal to rounding."""
        names = ("loss/total", "policy/grad_norm")
        return all(_same(self.recorded[name], self.metrics[name]) for name in names)

    def __str__(self) -> str:
        lines = [f"{'metric':<24} {'recorded':>14} {'computed again':>14}"]
        lines += [
            f"{name:<24} {self.recorded[name]:>14.6g} {self.metrics[name]:>14.6g}" for name in sorted(self.recorded)
        ]
        lines.append(f"samples that are not finite by themselves: {self.samples or 'none'}")
        lines.append(f"parameters with such a gradient: {', '.join(self.broken_gradients[:5]) or 'none'}")
        lines.append(f"parameters that are not finite: {', '.join(self.broken_parameters[:5]) or 'none'}")
        return "\n".join([*lines, "reproduced" if self.is_reproduced else "NOT reproduced"])


def replay(folder: str | Path, model: Any = None) -> Replay:
    """Compute the refused optimizer step of a dump again, in one process; nothing is changed.

    Args:
        folder: The dump.
        model: The value-head wrapper to use; None: the weights of the dump. Needed where the dump holds adapters
            whose base model cannot be found by its name.

    Raises:
        ValueError: There is no dump, or it is of another format.
    """
    folder = Path(folder)
    facts = _read(folder)
    if model is None:
        kind = AutoModelForSeq2SeqLMWithValueHead if facts["is_encoder_decoder"] else AutoModelForCausalLMWithValueHead
        options: dict[str, Any] = {"is_trainable": True} if (folder / MODEL / "adapter_config.json").is_file() else {}
        model = kind.from_pretrained(str(folder / MODEL), dtype=getattr(torch, facts["dtype"]), **options)
    policy = TokenPolicy(model, **facts["scoring"])
    if facts["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        disable_dropout(model)
        policy.checkpointing = True
    accelerator = Accelerator(mixed_precision=facts["mixed_precision"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    policy, optimizer = accelerator.prepare(policy, torch.optim.SGD(parameters, lr=0.0))
    update = build_algorithm(
        dumped_algorithm(facts["algorithm"]), policy=policy, optimizer=optimizer, accelerator=accelerator,
        minibatch=lambda: MinibatchConfig(**facts["minibatch"]), seed=0,
    ).update  # fmt: skip
    update.load_state_dict(facts["update"])
    batch = read_batch(folder).to(accelerator.device)
    rows = torch.tensor(facts["rows"], device=accelerator.device)
    steps = innermost_update(update)
    whole = steps.examine(batch, rows)
    alone = [row for row in facts["rows"] if not steps.examine(batch, torch.tensor([row])).is_finite]
    return Replay(
        recorded={name: float(value) for name, value in facts["metrics"].items() if name in whole.metrics},
        metrics=whole.metrics, broken_gradients=whole.broken, broken_parameters=broken_parameters(model), samples=alone,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Print what came out; 0 if it is what the run saw, else 1."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_ppo.replay", description=__doc__)
    parser.add_argument("dump", type=Path, help="folder that the error message named")
    try:
        found = replay(parser.parse_args(arguments).dump)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(found)  # noqa: T201
    return 0 if found.is_reproduced else 1


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    if not path.is_file():
        raise ValueError(
            f"expected a dump, got {folder} without {FACTS}: there is nothing to compute again. Give the folder that "
            "the error message named."
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got something else ({error}): the dump is damaged.") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        got = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"expected a dump of format {FORMAT}, got {got!r}: use the version that wrote it.")
    return facts


def _same(recorded: float, computed: float) -> bool:
    if math.isnan(recorded) or math.isinf(recorded):
        return not math.isfinite(computed)
    return math.isclose(recorded, computed, rel_tol=1e-4, abs_tol=1e-6)


if __name__ == "__main__":
    sys.exit(main())
