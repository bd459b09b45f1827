"""`rlhf-ppo ppo`: a PPO run from a YAML file, flags, or both.

Settings of the run itself have flags. The sections `ppo`, `train`, `sampling` and `algorithm_config` hold the fields of
`PPOConfig`, `TrainConfig`, `SamplingConfig` and of the algorithm; `--ppo.learning_rate 1e-5` or
`--algorithm_config.gae.lam 0.9` sets one of them.
"""

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_ppo.cli.run_config import SECTIONS, RunConfig, refuse_unknown
from rlhf_ppo.utils.flags import FlagParser, add_flags, read_settings, read_value

EXAMPLES = """examples:
  rlhf-ppo ppo --prompts prompts.jsonl --reward rewards.py:length --sampling.max_new_tokens 32
  rlhf-ppo ppo run.yaml --ppo.learning_rate 3e-6 --output-dir runs/lower-rate
  rlhf-ppo ppo run.yaml --print-config > run-again.yaml
  accelerate launch -m rlhf_ppo ppo run.yaml"""


def main(arguments: list[str]) -> int:
    """Run, or print the settings; exit status 2 for settings that cannot be read, 1 for a run that cannot be made."""
    try:
        config, print_config = parse(arguments)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    if print_config:
        sys.stdout.write(yaml.safe_dump(asdict(config), sort_keys=False))
        return 0
    from rlhf_ppo.cli.ppo_run import run  # torch comes with it

    try:
        run(config)
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


def parse(arguments: list[str]) -> tuple[RunConfig, bool]:
    """The settings, and whether they are only to be printed.

    Raises:
        ValueError: A file that cannot be read, or a name that no setting has.
        TypeError: A setting of another type.
    """
    own, of_sections = _split(arguments)
    given = vars(_parser().parse_args(own))
    file, print_config = given.pop("config"), given.pop("print_config")
    settings = ({} if file is None else read_settings(file)) | given
    refuse_unknown(settings, [item.name for item in fields(RunConfig)], "setting")
    for path, value in of_sections:
        _set(settings, path, value)
    settings = {name: value for name, value in settings.items() if value is not None}
    if type(settings.get("prompts")) is int:  # a number of episodes
        settings["prompts"] = str(settings["prompts"])
    return RunConfig(**settings), print_config


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        "rlhf-ppo ppo", usage="%(prog)s [FILE] [options]", epilog=EXAMPLES,
        description="Train a policy with PPO. A flag overrides the file. --ppo.NAME, --train.NAME, --sampling.NAME\n"
        "and --algorithm_config.NAME set fields of PPOConfig, TrainConfig, SamplingConfig and the algorithm.",
    )  # fmt: skip
    parser.add_argument("config", nargs="?", type=Path, metavar="FILE", help="YAML file of settings")
    parser.add_argument("--print-config", action="store_true", help="print the settings as YAML and stop")
    add_flags(parser, RunConfig, left_out=SECTIONS, overriding=True)
    return parser


def option_names() -> list[str]:
    """The options of the command line."""
    return [name for action in _parser()._actions for name in action.option_strings]


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, name in enumerate(path[:-1], 1):
        settings[name] = inner = {} if settings.get(name) is None else settings[name]
        if not isinstance(inner, dict):
            raise ValueError(f"--{'.'.join(path)} needs fields in {'.'.join(path[:depth])}, got the value {inner!r}.")
        settings = inner
    settings[path[-1]] = value


def _split(arguments: list[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """Flags of the run itself; and of `--section.field value` or `--section.field=value` the path and the value."""
    own: list[str] = []
    of_sections = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        path = flag.removeprefix("--").replace("-", "_").split(".")
        if not (flag.startswith("--") and len(path) > 1 and path[0] in SECTIONS):
            own.append(word)
            continue
        text = value if equals else next(words, None)
        if text is None:
            raise ValueError(f"{flag} needs a value.")
        of_sections.append((path, read_value(text)))
    return own, of_sections
