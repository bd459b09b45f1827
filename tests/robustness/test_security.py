"""The promises of docs/security.md: nothing in a user's folder runs code, reads elsewhere, or tells a secret."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from recipes.sentiment.command_line import open_run_folder
from reward_model.serving.client import RemoteRewardModel
from reward_model.serving.config import ServeConfig
from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.checkpoints.folders import MANIFEST, CheckpointError, find_damage
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.models.value_head import read_value_head
from rlhf_ppo.utils.access import is_authorized
from rlhf_ppo.utils.redaction import redacted
from tests.robustness.old_format import as_format_1
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer
from tests.support.tiny_run import config, parameters, share_of_e, trainer

SECRET = "hf_mysecret"


class Bomb:
    """What an attacker pickles: it leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, (f"open({str(self.mark)!r}, 'w').close()",))


def sign(folder: Path) -> None:
    """Make the manifest fit, as whoever can write into the folder can."""
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != MANIFEST
    }
    content = {"format": json.loads((folder / MANIFEST).read_text())["format"], "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256": digest}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer().train(share_of_e, config(folder, iterations=1, save_every=1))
    return folder


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
def test_a_pickle_in_any_file_of_a_checkpoint_is_refused_and_never_run(run: Path, tmp_path: Path, old: bool) -> None:
    mark = tmp_path / "mark"
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    checkpoint = folder / "checkpoint-1"
    if old:
        as_format_1(checkpoint)
    own = trainer()
    before = parameters(own).clone()
    for path in sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST):
        content = path.read_bytes()
        for bomb in (pickle.dumps(Bomb(mark), protocol=2), _saved_by_torch(Bomb(mark), tmp_path)):
            path.write_bytes(bomb)
            sign(checkpoint)
            with pytest.raises(CheckpointError, match=r"checkpoint-1"):
                own.train(share_of_e, config(folder, iterations=2))
        path.write_bytes(content)
    assert not mark.exists()
    assert torch.equal(parameters(own), before)
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb works where it is let


def _saved_by_torch(value: object, folder: Path) -> bytes:
    torch.save(value, folder / "bomb")
    return (folder / "bomb").read_bytes()


def test_a_pickle_beside_an_adapter_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "model").mkdir()
    torch.save({"v_head.summary.weight": Bomb(mark)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read_value_head(tmp_path / "model")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_that_names_files_elsewhere_is_damage(name: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(run / "checkpoint-1", folder)
    (tmp_path / "secret").write_text("x")
    content = json.loads((folder / MANIFEST).read_text())
    files = content["files"] | {name: hashlib.sha256(b"x").hexdigest()}
    signed = {"format": content["format"], "files": files}
    digest = hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(signed | {"sha256": digest}))
    assert "no file of this folder" in str(find_damage(folder))


def test_folders_that_only_look_like_checkpoints_are_left_alone(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    names = ("checkpoint-x", "checkpoint--1", "checkpoint-1.old", "checkpoint-" + "9" * 30)
    for name in names:
        shutil.copytree(run / "checkpoint-1", folder / name)
    trainer().train(share_of_e, config(folder, iterations=2, save_every=1, keep_last=1))
    assert all((folder / name / MANIFEST).is_file() for name in names)


def test_an_index_of_shards_reads_no_file_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"v_head.summary.bias": torch.zeros(1)}, tmp_path / "elsewhere.bin")
    index = {"weight_map": {"v_head.summary.bias": "../elsewhere.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside"):
        read_value_head(folder)


def test_code_that_comes_with_a_model_is_not_run_unless_asked(tmp_path: Path) -> None:
    """Nor is anybody asked at a prompt, where a batch job would hang."""
    mark, folder = tmp_path / "mark", tmp_path / "model"
    tiny_gpt2().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))
    assert not mark.exists()


def test_secrets_are_known_by_the_name_of_their_setting_and_by_their_place_in_an_address() -> None:
    settings = {
        "push": {"token": SECRET, "repo_id": "me/model"}, "hub_token": SECRET, "wandb-api-key": SECRET,
        "url": f"https://me:{SECRET}@example.org/score", "max_new_tokens": 24, "token_budget": 5, "token": None,
    }  # fmt: skip
    found = redacted(settings)
    assert SECRET not in json.dumps(found)
    assert found["url"] == "https://***@example.org/score"
    assert found["push"]["repo_id"] == "me/model"
    assert (found["max_new_tokens"], found["token_budget"], found["token"]) == (24, 5, None)


def test_no_secret_reaches_run_folder_tracker_checkpoint_or_model_card(tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    tokenizer = tiny_tokenizer()
    settings = PPOConfig(
        batch_size=4, mini_batch_size=4, ppo_epochs=1, log_with="tensorboard",
        project_kwargs={"logging_dir": str(tmp_path)}, tracker_kwargs={"tensorboard": {"comment": ""}},
        push_to_hub_if_best_kwargs={"repo_id": "me/x", "token": SECRET},
        reward_model=f"https://me:{SECRET}@example.org",
    )  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    own = PPOTrainer(settings, model, tokenizer=tokenizer, dataset=trainer().dataset)
    RunFolder.create(tmp_path).write_config({"hub_token": SECRET, "reward_url": f"http://a:{SECRET}@b/score"})
    own.trackers.begin()
    settings.push_to_hub_if_best_kwargs = {}  # which `train()` refuses
    own.train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    own.save_pretrained(tmp_path / "model")
    own.accelerator.end_training()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "README.md", "state.json"} <= {path.name for path in written}
    assert any("tfevents" in path.name for path in written)
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def test_a_run_folder_of_the_same_hidden_settings_is_the_same_run(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    settings = {"reward_url": f"http://me:{SECRET}@127.0.0.1:1/score", "seed": 0}
    open_run_folder(str(folder), settings, fresh=False)
    open_run_folder(str(folder), settings, fresh=False)
    assert SECRET not in (folder / "config.json").read_text()


def test_an_error_of_the_reward_client_does_not_tell_the_password_in_its_address() -> None:
    remote = RemoteRewardModel(f"http://me:{SECRET}@127.0.0.1:9", retries=0, timeout=1)
    with pytest.raises(ConnectionError) as caught:
        remote(["a"], ["b"])
    assert SECRET not in str(caught.value)
    assert "127.0.0.1:9" in str(caught.value)


def test_the_servers_token_may_come_from_the_environment_where_no_list_of_processes_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REWARD_MODEL_TOKEN", SECRET)
    own = ServeConfig(model="-", host="0.0.0.0")
    assert SECRET not in repr(own)
    assert is_authorized(f"Bearer {SECRET}", own.secret)
    assert not is_authorized("Bearer ", own.secret)
    assert not is_authorized(None, own.secret)
