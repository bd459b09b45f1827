"""The command `rlhf-ppo`: help without torch, subcommands, and wrong calls."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ppo.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


def test_help_is_shown_without_torch() -> None:
    """In a process of its own: the help of the command and of `run` imports neither torch nor transformers."""
    code = (
        "import sys; from rlhf_ppo.cli import main; assert main(['--help']) == 0 == main(['run', '--help']);"
        "assert not {'torch', 'transformers', 'trl'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in shown for name in COMMANDS) and "rlhf-ppo run SCRIPT" in shown


def test_wrong_calls_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    assert main(["run", "nowhere.py"]) == 2
    assert main(["run"]) == 2
    error = capsys.readouterr().err
    assert "there is no command 'nonsense'" in error
    assert "there is no script 'nowhere.py'" in error and "name a script" in error


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
