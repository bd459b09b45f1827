"""Every command that a page shows: its program is there and has each option. Their runs have tests of their own."""

import importlib
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
import tyro

from rlhf_ppo import PPOClip, PPOConfig, TrainConfig
from rlhf_ppo.cli import COMMANDS, main
from rlhf_ppo.cli.ppo import parse
from rlhf_ppo.cli.ppo_run import make_configs
from rlhf_ppo.samplers.base import SamplingConfig
from tests.docs.pages import PAGES, ROOT, blocks, commands

TARGETS = set(re.findall(r"^([a-z-]+)(?=[ a-z-]*:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
FOREIGN = ("pip", "git", "cd", "ssh", "srun", "vllm", "conda")
SECTIONS = {"ppo": PPOConfig, "train": TrainConfig, "sampling": SamplingConfig, "algorithm_config": PPOClip}
LAUNCHER = ("--config_file", "--num_processes", "--cpu")
"""Options of `accelerate launch`."""


def said(program: Callable[[], object]) -> str:
    """What a program prints for `--help`."""
    with redirect_stdout(StringIO()) as text, suppress(SystemExit), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)
        program()
    return text.getvalue()


@cache
def help_of(program: str) -> str:
    """The help of a subcommand of `rlhf-ppo`, of a module or of a recipe; of a module of the tests its source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        if program.endswith(".py"):
            patch.syspath_prepend(str(ROOT / "recipes"))
            recipe = importlib.import_module(Path(program).stem)
            return said(lambda: tyro.cli(getattr(recipe, "Config", recipe.main), args=["--help"]))
        if program.startswith("tests."):
            return (ROOT / program.replace(".", "/")).with_suffix(".py").read_text()
        if program in COMMANDS and program != "run":
            return said(lambda: main([*program.split(), "--help"]))
        patch.setattr(sys, "argv", [program, "--help"])
        return "" if program in ("run", "rlhf_ppo") else said(lambda: runpy.run_module(program, run_name="__main__"))


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The program of a command, and its arguments; "" for another project's program."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    launched = words[:2] == ["accelerate", "launch"]
    if launched:
        words = words[2:]
        while words and words[0] in LAUNCHER:
            words = words[1 if words[0] == "--cpu" else 2 :]
    if words[:1] == ["python"]:
        words = words[1:]
    if words[:1] == ["-m"]:
        words = words[1:]
    if words[:1] in (["rlhf-ppo"], ["rlhf_ppo"]):
        name = next((name for name in (" ".join(words[1:3]), *words[1:2]) if name in COMMANDS), "rlhf_ppo")
        return name, words[1 + (0 if name == "rlhf_ppo" else len(name.split())) :]
    return (words[0], words[1:]) if words and words[0].split(".")[0] not in FOREIGN else ("", [])


def check_options(program: str, arguments: list[str]) -> None:
    """Each option must be in the program's help, or a field of the section that it names in `rlhf-ppo ppo`."""
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        section, *name = option.removeprefix("--").split(".")
        if program == "ppo" and section in SECTIONS:
            assert name[0] in {item.name for item in fields(SECTIONS[section])}, f"there is no {option}"
        elif program != "run" and not option.startswith("--tyro-"):
            spelled = {option, option.replace("-", "_").replace("__", "--", 1), option.replace("_", "-")}
            assert any(one in help_of(program) for one in spelled), f"{program} has no option {option}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.stem)
def test_the_commands_of_a_page_name_programs_and_options_that_are_there(page: Path) -> None:
    for command in commands(page.read_text()):
        words = shlex.split(command, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= TARGETS, command
            given = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
            check_options("recipes/ppo_gpt2_sentiment.py", shlex.split(given[0]) if given and "demo" in words else [])
            continue
        program, arguments = program_of(words)
        if program.endswith((".py", ".sh")) or program == ".ci/run":
            own = {"script.py", *(block.title for block in blocks(page.read_text()))}
            assert (ROOT / program).exists() or program in own, command
        elif program and program not in COMMANDS:
            assert find_spec(program) is not None, command
        if program.startswith("recipes/") or not program.endswith((".py", ".sh", "run")) or program == "run":
            check_options(program, arguments)


def test_the_settings_files_of_the_command_line_page_are_read(tmp_path: Path) -> None:
    files = [block.text for block in blocks((ROOT / "docs/command-line.md").read_text()) if block.language == "yaml"]
    assert len(files) == 2
    for text in files:
        (tmp_path / "run.yaml").write_text(text)
        make_configs(parse([str(tmp_path / "run.yaml")])[0])
