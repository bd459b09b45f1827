"""The command `python -m reward_model.evaluate`, which measures a reward model on held-out comparisons."""

import importlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_model.utils.commands import model_as_option, parse, run
from reward_model.utils.options import DataOptions, ModelOptions

if TYPE_CHECKING:
    from reward_model.evaluation.report_card import Scorer

EXAMPLES = """  rlhf-ppo reward evaluate runs/my_reward --data held_out.jsonl
  rlhf-ppo reward evaluate runs/my_reward --data benchmark.jsonl --others other/reward-model"""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions, DataOptions):
    """Reward model, held-out data and output files."""

    data: list[str]
    """Held-out preferences as for training, or a benchmark in the shape of RewardBench 2."""
    split: str = "test"
    """Which split of a folder or hub dataset to read."""
    judge: str | None = None
    """Scorer of the best-of-N curve: a reward model, a server's URL, or module:function."""
    others: list[str] = field(default_factory=list)
    """Scorers to compare the model with; given as the judge is."""
    page: str | None = None
    """HTML page to write, or none; default: report_card.html beside the model, for a hub name in the current folder."""
    json: str | None = None
    """File for the numbers; default: report_card.json beside the model, for a hub name in the current folder."""
    seed: int = 0
    """Seed of the pairs drawn from labeled texts."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compute the report card, print it, write it as JSON and HTML, and return it."""
    (config,) = parse(
        (EvaluateConfig,),
        model_as_option(arguments),
        program="python -m reward_model.evaluate",
        description="Evaluate a reward model on held-out comparisons: accuracy, calibration, biases, stability.",
        examples=EXAMPLES,
    )
    # torch comes with these
    from reward_model.data.preparation import load_data
    from reward_model.evaluation.card_page import text_table, write_page
    from reward_model.evaluation.report_card import model_facts, report_card
    from reward_model.models.encoding import split_encodable
    from reward_model.models.ensemble import first_member, load_model
    from reward_model.training.tracking import training_curves

    model = load_model(config)
    folder = Path(config.model) if Path(config.model).is_dir() else Path()  # a hub name has no folder here
    loaded, first = load_data(config, seed=config.seed), first_member(model)
    comparisons, refused = split_encodable(
        loaded.comparisons, first.tokenizer, first.contract.text, on_bad_row=config.on_bad_row
    )
    others = {name: load_scorer(name, config.trust_remote_code) for name in config.others}
    judge = load_scorer(config.judge, config.trust_remote_code) if config.judge else None
    card = report_card(model, comparisons, judge=judge, others=others)
    card["data"] = loaded.report.as_dict() | {"not_encodable": len(refused)}
    card["training"] = training_curves(Path(config.model))
    print(text_table(card))  # noqa: T201  the command's answer
    target = Path(config.json) if config.json else folder / "report_card.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(_finite(card), indent=1) + "\n", encoding="utf-8")
    if config.page != "none":
        page = Path(config.page) if config.page else folder / "report_card.html"
        write_page(card, page, title=Path(config.model).name, facts=model_facts(model))
        print(f"page: {page}")  # noqa: T201
    return card


def load_scorer(name: str, trust_remote_code: bool = False) -> "Scorer":
    """A scorer: a reward model's folder or hub name, the URL of its server, `module:function`; else a ValueError."""
    if name.startswith(("http://", "https://")):
        from reward_model.serving.client import RemoteRewardModel

        return RemoteRewardModel(name, token=os.environ.get("REWARD_MODEL_TOKEN"))
    from reward_model.models.ensemble import load_reward_model

    module, colon, attribute = name.partition(":")
    if not colon or Path(name).is_dir():
        return load_reward_model(name, trust_remote_code=trust_remote_code)
    try:
        scorer: Scorer = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name} is no scorer: {error}. Give a reward model, the URL of its server, or module:function."
        ) from error
    if not callable(scorer):
        raise ValueError(f"{name} is no scorer, but of type {type(scorer).__name__}: name a function.")
    return scorer


def _finite(value: Any) -> Any:
    """Replace nan and infinity, which JSON does not have, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    run(main, alone=True)
