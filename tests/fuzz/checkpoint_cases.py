"""Checkpoint folders that somebody has cut, flipped, emptied, swapped or rewritten, checksums fitting or not."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.checkpoints.folders import MANIFEST
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.loop.training import TrainingLoop
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.fuzz.config_cases import trees
from tests.fuzz.harness import Target
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

DAMAGES = [
    "flip", "flip", "cut", "empty", "grow", "remove", "swap", "json", "key", "folder", "format", "format",
    "tree", "tree", "tensor", "tensor", "manifest",
]  # fmt: skip
OTHERS = [(3, 4), (4,), (), (2, 2, 2)]

damage = st.fixed_dictionaries(
    {
        "how": st.sampled_from(DAMAGES), "file": st.integers(0, 30), "other": st.integers(0, 30),
        "at": st.floats(0, 1), "bit": st.integers(0, 7), "bytes": st.binary(max_size=8), "tree": trees,
        "key": st.integers(0, 30), "checkpoint": st.sampled_from(["newest", "older", "both", "both"]),
    }
)  # fmt: skip
cases = st.tuples(st.lists(damage, min_size=1, max_size=3), st.booleans())
"""Damages, and whether checksums are made to fit afterwards."""


def _damage(folder: Path, wish: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return
    path = files[wish["file"] % len(files)]
    content = path.read_bytes()
    at = int(wish["at"] * max(0, len(content) - 1))
    match wish["how"]:
        case "flip" if content:
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << wish["bit"])]) + content[at + 1 :])
        case "cut":
            path.write_bytes(content[:at])
        case "empty":
            path.write_bytes(b"")
        case "grow":
            path.write_bytes(content[:at] + wish["bytes"] + content[at:])
        case "remove":
            path.unlink()
        case "swap":
            path.write_bytes(files[wish["other"] % len(files)].read_bytes())
        case "folder":
            path.unlink()
            path.mkdir()
        case "json":
            jsons = [each for each in files if each.suffix == ".json"]
            if jsons:
                jsons[wish["file"] % len(jsons)].write_text(json.dumps(wish["tree"]))
        case "key":
            _change_key(folder, wish)
        case "manifest":
            (folder / MANIFEST).unlink(missing_ok=True)
        case "format" if (folder / MANIFEST).is_file():
            _rewrite_format(folder, wish)
        case "tree" | "tensor":
            _rewrite_contents(folder, wish)


def _change_key(folder: Path, wish: dict[str, Any]) -> None:
    """Replace or remove one key of a settings file, in reach of the first three levels."""
    for path in sorted(folder.glob("*.json"), key=lambda each: (wish["file"] % 2 == 0) == (each.name == MANIFEST)):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        inner, spots = content, []
        todo = [content]
        while todo:
            inner = todo.pop()
            if isinstance(inner, dict):
                spots += [(inner, key) for key in inner]
                todo += list(inner.values())
        if spots:
            holder, key = spots[wish["key"] % len(spots)]
            if wish["bit"] % 2:
                holder[key] = wish["tree"]
            else:
                del holder[key]
            path.write_text(json.dumps(content))
        return


def _rewrite_format(folder: Path, wish: dict[str, Any]) -> None:
    """Another version number, or none, signed."""
    manifest = {"files": {}} | _read_or(folder / MANIFEST, {})
    manifest["format"] = [0, 1, 3, -1, 99, "2", None, 2.5][wish["bit"]]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _rewrite_contents(folder: Path, wish: dict[str, Any]) -> None:
    """A part or a tensor of one file replaced, taken away, or given another shape or type; the file stays readable."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    path = files[wish["file"] % len(files)]
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError):
        return
    if wish["how"] == "tensor" and tensors:
        name = sorted(tensors)[wish["key"] % len(tensors)]
        match wish["bit"] % 4:
            case 0:
                del tensors[name]
            case 1:
                tensors[name] = torch.zeros(OTHERS[wish["other"] % len(OTHERS)])
            case 2:
                tensors[name] = tensors[name].to([torch.float64, torch.int32, torch.float16][wish["other"] % 3])
            case _:
                tensors["other"] = tensors.pop(name)
    elif metadata:
        (key,) = metadata
        metadata = {key: json.dumps(_with_change(json.loads(metadata[key]), wish))}
    save_file(tensors, path, metadata=metadata)


def _with_change(tree: Any, wish: dict[str, Any]) -> Any:
    """The tree with one of its nodes replaced."""
    spots: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        inner = todo.pop()
        keys: Any = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        spots += [(inner, key) for key in keys]
        todo += [inner[key] for key in keys]
    holder, key = spots[int(wish["at"] * (len(spots) - 1))]
    holder[key] = wish["tree"]
    return tree


def _read_or(path: Path, otherwise: Any) -> Any:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return otherwise
    return found if isinstance(found, dict) else otherwise


def _make_checksums_fit(folder: Path) -> None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in manifest["files"]:
            manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        signed = {"format": int(manifest["format"]), "files": manifest["files"]}
        manifest["sha256"] = hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(manifest))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return


def target(folder: Path) -> Target:
    """A run of two iterations with two checkpoints; each case damages a copy and resumes from it."""
    good, copy = folder / "good", folder / "copy"
    tokenizer = tiny_tokenizer()
    model = tiny_gpt2(vocab_size=len(tokenizer), n_layer=1, n_embd=4, n_head=1, n_positions=12)
    config = TrainConfig(
        iterations=2, sampling=SamplingConfig(max_new_tokens=3), output_dir=str(good), save_every=1, progress=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = PPOTrainer(
            PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1),
            AutoModelForCausalLMWithValueHead.from_pretrained(model),
            tokenizer=tokenizer, dataset=PromptDataset.from_texts(["The", "I liked"], tokenizer),
        )  # fmt: skip
        trainer.train(lambda responses: [1.0] * len(responses), config)
    loop = TrainingLoop(trainer, trainer.dataset, lambda responses: [1.0] * len(responses), config)  # type: ignore[arg-type]
    parameters = list(trainer.model.parameters())
    before: list[Any] = []
    weights = {path.name: load_file(path / "model.safetensors") for path in good.glob("checkpoint-*")}

    def state() -> list[Any]:
        optimizer = [value for each in trainer.optimizer.state.values() for value in each.values()]
        tensors = [torch.as_tensor(value).clone() for value in [*parameters, *optimizer, torch.get_rng_state()]]
        plain = [trainer.kl_ctl.value, repr(trainer.algorithm.update.state_dict()), repr(loop.order.state_dict())]
        return [*plain, tensors]

    def attempt(case: tuple[list[dict[str, Any]], bool]) -> str:
        wishes, fitting = case
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        for wish in wishes:
            for name in {"newest": ["2"], "older": ["1"], "both": ["1", "2"]}[wish["checkpoint"]]:
                _damage(copy / f"checkpoint-{name}", wish)
        if fitting:
            for checkpoint in copy.glob("checkpoint-*"):
                _make_checksums_fit(checkpoint)
        before[:] = state()
        loop.keeper.folder = RunFolder(copy)
        loop.state.iteration = 0
        loop.restore()
        if not loop.state.iteration:
            return "begun anew"
        named = dict(trainer.model.named_parameters())
        saved = weights[f"checkpoint-{loop.state.iteration}"]
        if not fitting and not all(torch.equal(named[name], saved[name]) for name in saved):
            raise AssertionError("restored weights are not those that were saved")
        return {1: "the one before", 2: "the newest"}[loop.state.iteration]

    def unchanged() -> bool:
        now = state()
        same = len(now[-1]) == len(before[-1]) and all(map(torch.equal, now[-1], before[-1]))
        return same and now[:-1] == before[:-1]

    return Target(cases=cases, attempt=attempt, unchanged=unchanged)
