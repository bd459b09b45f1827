"""The command `python -m reward_model.adopt MODEL`, which infers the contract of another maker's reward model."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reward_model.models.contract import CONTRACT_FILE, Contract
from reward_model.utils.commands import model_as_option, parse, run
from reward_model.utils.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class AdoptConfig(ModelOptions):
    """Reward model of another maker, and what of its contract is known better than inferred."""

    template: Literal["auto", "plain", "chat"] = "auto"
    """How prompt and response become one text; auto is chat if the tokenizer has a chat template."""
    append_eos: bool | None = None
    """Whether the end-of-text token is appended; None: inferred."""
    max_length: int = 0
    """Maximum tokens of prompt + response; 0: inferred."""
    write: bool = False
    """Write the contract into the model's folder, so that it is not inferred again."""


def main(arguments: Sequence[str] | None = None) -> Contract:
    """Infer the contract, print it, and write it if asked."""
    (config,) = parse(
        (AdoptConfig,),
        model_as_option(arguments),
        program="python -m reward_model.adopt",
        description="Infer the contract of another maker's reward model, print it, and write it beside the model.",
        examples="  python -m reward_model.adopt other/reward-model --write",
    )
    from reward_model.models.adoption import adopt  # torch comes with it
    from reward_model.models.loading import check_length
    from reward_model.models.text import prepare_tokenizer

    folder = Path(config.model)
    if config.write and (folder / CONTRACT_FILE).is_file() and Contract.read(folder).layout == "own":
        raise ValueError(
            f"{folder / CONTRACT_FILE} was written by training: another would lose the normalization and what it says "
            "of the data. Load the folder as it is; to change a field, edit a copy of the folder."
        )
    parts = adopt(config.model, label=config.label, trust_remote_code=config.trust_remote_code)
    changes: dict[str, Any] = {"template": config.template} if config.template != "auto" else {}
    changes |= {"append_eos": config.append_eos} if config.append_eos is not None else {}
    changes |= {"max_length": config.max_length} if config.max_length else {}
    contract = replace(parts.contract, text=replace(parts.contract.text, **changes))
    prepare_tokenizer(parts.tokenizer, contract.text, source=config.model)
    check_length(parts.model, contract, config.model)
    print(json.dumps(asdict(contract), indent=2))  # noqa: T201  the command's answer
    if config.write:
        if not folder.is_dir():
            raise ValueError(
                f"{config.model} is a hub name, so there is no folder for {CONTRACT_FILE}. Download it first: "
                f"`hf download {config.model} --local-dir FOLDER`, and adopt the folder."
            )
        contract.write(folder)
        print(f"written: {folder / CONTRACT_FILE}")  # noqa: T201
    return contract


if __name__ == "__main__":
    run(main, alone=True)
