"""The command `rlhf-ppo`: help without torch, subcommands, and wrong calls."""

import json
import os
import subprocess
import sys
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest

from rlhf_ppo.cli import COMMANDS, main
from tests.recipes.tiny_world import save_gpt2

ROOT = Path(__file__).parents[2]


def test_every_help_is_shown_without_torch_and_fits_a_screen() -> None:
    """In a process of its own: no help imports torch, transformers or datasets, and none is longer than 45 x 100."""
    code = (
        "import contextlib, io, json, sys\nfrom rlhf_ppo.cli import COMMANDS, main\nshown = {}\n"
        "for name in ('', *COMMANDS):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "        main([*name.split(), '--help'])\n"
        "    shown[name] = said.getvalue()\n"
        "print(json.dumps([shown, sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & sys.modules.keys())]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    shown, imported = json.loads(run.stdout)
    assert imported == []
    for name, text in shown.items():
        lines = text.splitlines()
        assert 5 <= len(lines) <= 45 and max(map(len, lines)) <= 100, (name, len(lines))
    assert all(f"  {name} " in shown[""] for name in COMMANDS)


def test_a_command_that_a_test_runs_leaves_no_bytecode_with_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain Python would load it afterwards, and end with a KeyError."""
    source = str(ROOT / "rlhf_ppo" / "plan" / "__main__.py")
    bytecode = Path(cache_from_source(source))
    bytecode.unlink(missing_ok=True)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert not bytecode.exists() or b"jaxtyped" not in bytecode.read_bytes()


def test_the_shell_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 0
    words = capsys.readouterr().out.split()
    assert {"ppo", "reward", "train", "serve", "--live", "--output-dir", "--print-config"} <= set(words)
    assert len(words) == len(set(words))


def test_bash_runs_what_the_command_prints_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = f'rlhf-ppo() {{ echo "--output-dir"; }}\n{capsys.readouterr().out}\ncomplete -p rlhf-ppo'
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert "-W '--output-dir' rlhf-ppo" in found.stdout
    assert main(["completion", "zsh"]) == 0
    zsh = capsys.readouterr().out
    assert 0 < zsh.find("&& compinit") < zsh.find("bashcompinit"), "a bare zsh has no compdef, which the latter calls"


def test_wrong_calls_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    assert main(["run", "nowhere.py"]) == 2
    assert main(["run"]) == 2
    assert main(["completion", "fish"]) == 2
    error = capsys.readouterr().err
    assert "there is no command 'nonsense'" in error
    assert "there is no script 'nowhere.py'" in error and "name a script" in error
    assert "expected bash or zsh, got 'fish'" in error


@pytest.mark.parametrize("as_module", [False, True])
def test_a_script_gets_its_arguments_its_folder_and_trls_lost_names(
    as_module: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "program.py").write_text(
        "import sys, beside\nfrom trl import PPOTrainer\nfrom trl.core import LengthSampler\n"
        "assert __name__ == '__main__' and beside.VALUE == 7 and sys.argv[1:] == ['--a', 'b']\n"
        "raise SystemExit(5)\n"
    )
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    named = ["-m", "program"] if as_module else [str(tmp_path / "program.py")]
    with pytest.raises(SystemExit) as left:
        main(["run", *named, "--a", "b"])
    assert left.value.code == 5
    for name in ("beside", "program"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("arguments", [["plan", "--help"], ["reward", "score", "--help"], ["merge", "--help"]])
def test_other_commands_are_the_modules_own(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0 and sys.argv == before
    assert f"python -m {COMMANDS[' '.join(arguments[:-1])][0]}" in capsys.readouterr().out


def test_every_command_names_a_module_that_is_there() -> None:
    assert all(find_spec(module) is not None for module, _ in COMMANDS.values())


def test_the_doctor_warns_of_nothing_in_a_sound_model_and_names_its_fast_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_gpt2(tmp_path / "gpt2")
    assert main(["doctor", str(tmp_path / "gpt2")]) == 0
    said = capsys.readouterr().out
    assert "[warning]" not in said and "fast paths: padding, head_rows, packing" in said
    assert main(["doctor", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
