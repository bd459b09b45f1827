"""Adapters and ensembles: what is loaded scores as what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
)

from reward_model import ContractError, RewardModel, train_reward_model
from reward_model.data.comparisons import as_comparisons
from reward_model.models.contract import Contract
from reward_model.models.ensemble import EnsembleRewardModel, load_reward_model, save_ensemble
from reward_model.models.loading import load_adapter
from reward_model.models.on_policy import reward_on_policy
from reward_model.training.arguments import lora_config
from reward_model.training.ensemble import train_ensemble
from reward_model.training.trainer import _finish
from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.checkpoints.folders import recover_replaced_folder
from tests.reward_model.conftest import preference_rows, tiny_config
from tests.support.tiny_models import VOCAB_SIZE, tiny_tokenizer

PROMPTS, RESPONSES = ["The movie was "] * 3, ["great", "awful and boring", "lovely good"]


def scores_before_and_after_saving(
    base: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[list[float], RewardModel]:
    """Raw scores of the model in the trainer's hands, and the artifact."""
    seen: list[float] = []

    def finish(trainer: Any, config: Any, contract: Any, *rest: Any) -> Any:
        result = _finish(trainer, config, contract, *rest)
        seen.extend(RewardModel(trainer.model, tiny_tokenizer(), contract).raw_scores(PROMPTS, RESPONSES))
        return result

    monkeypatch.setattr("reward_model.training.trainer._finish", finish)
    rows = preference_rows(100)
    path = train_reward_model(tiny_config(base, output, **changes), train=rows[:80], evaluation=rows[80:]).path
    return seen, RewardModel.from_pretrained(path)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4, "merge_adapter": False}], ids=["full", "adapter"])
def test_scores_survive_saving_and_loading(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    trained, loaded = scores_before_and_after_saving(tiny_base, tmp_path / "rm", monkeypatch, **changes)
    assert_close(loaded.raw_scores(PROMPTS, RESPONSES), trained, atol=1e-6, rtol=0)


def test_merged_and_unmerged_adapters_score_alike(tiny_base: Path, tmp_path: Path) -> None:
    rows = preference_rows(100)
    scores = []
    for merge in (True, False):
        config = tiny_config(tiny_base, tmp_path / f"rm-{merge}", lora_rank=4, merge_adapter=merge, learning_rate=1e-2)
        path = train_reward_model(config, train=rows[:80], evaluation=rows[80:]).path
        assert (path / "adapter_config.json").exists() is not merge
        scores.append(RewardModel.from_pretrained(path).raw_scores(PROMPTS, RESPONSES))
    assert_close(scores[0], scores[1], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own
def test_an_adapter_keeps_all_that_is_new_above_the_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=64, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    DistilBertModel(config).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted = get_peft_model(model, lora_config(model, rank=2, alpha=4)).eval()
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert any("pre_classifier.modules_to_save" in name for name in trained)
    assert any("q_lin.lora_A" in name for name in trained)
    adapted.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    loaded = load_adapter(tmp_path / "adapter", head=None, dtype=torch.float32).eval()
    ids = torch.tensor([[3, 4, 5]])
    assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own
def test_an_adapter_holds_what_its_base_lacks_and_is_refused_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pooler of BERT: a masked language model comes without one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=VOCAB_SIZE, **sizes)).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    changes = {"lora_rank": 2, "merge_adapter": False}
    trained, loaded = scores_before_and_after_saving(tmp_path / "base", tmp_path / "rm", monkeypatch, **changes)
    assert_close(loaded.raw_scores(PROMPTS, RESPONSES), trained, atol=1e-6, rtol=0)
    weights = load_file(tmp_path / "rm" / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, tmp_path / "rm" / "adapter_model.safetensors")
    with pytest.raises(ContractError, match=r"neither the adapter nor its base .*bert\.pooler\.dense.*random numbers"):
        RewardModel.from_pretrained(tmp_path / "rm")


def test_auto_classes_load_merged_adapters(tiny_base: Path, tmp_path: Path) -> None:
    rows = preference_rows(60)
    config = tiny_config(tiny_base, tmp_path / "rm", lora_rank=4)
    path = train_reward_model(config, train=rows[:40], evaluation=rows[40:]).path
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer("The movie was great")["input_ids"] + [tokenizer.eos_token_id]])
    assert RewardModel.from_pretrained(path).raw_scores(["The movie was "], ["great"]) == [model(ids).logits.item()]


def test_an_adapter_without_its_head_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """The silent loss of the head behind many a useless reward model."""
    rows = preference_rows(60)
    config = tiny_config(tiny_base, tmp_path / "rm", lora_rank=4, merge_adapter=False)
    path = train_reward_model(config, train=rows[:40], evaluation=rows[40:]).path
    weights = load_file(path / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "score" not in name}
    assert len(kept) < len(weights)
    save_file(kept, path / "adapter_model.safetensors")
    with pytest.raises(ContractError, match="field head names"):
        RewardModel.from_pretrained(path)


def test_code_of_an_adapters_tokenizer_runs_if_it_is_trusted(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    rows = preference_rows(60)
    config = tiny_config(tiny_base, tmp_path / "rm", lora_rank=4, merge_adapter=False)
    path = train_reward_model(config, train=rows[:40], evaluation=rows[40:]).path
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    loaded = RewardModel.from_pretrained(path, trust_remote_code=True)
    adapter = LoraConfig(r=2, fan_in_fan_out=True)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(str(tiny_base), peft_config=adapter)
    shared = reward_on_policy(policy, path, trust_remote_code=True)
    assert_close(shared.raw_scores(PROMPTS, RESPONSES), loaded.raw_scores(PROMPTS, RESPONSES), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="trust_remote_code"):
        RewardModel.from_pretrained(path)


def test_an_adapter_whose_base_moved_away_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    rows = preference_rows(60)
    config = tiny_config(tiny_base, tmp_path / "rm", lora_rank=4, merge_adapter=False)
    path = train_reward_model(config, train=rows[:40], evaluation=rows[40:]).path
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ContractError, match="which cannot be loaded"):
        RewardModel.from_pretrained(path)


@pytest.fixture(scope="module")
def ensemble_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = as_comparisons(preference_rows(140), "rows")
    config = tiny_config(tiny_base, tmp_path_factory.mktemp("ensemble") / "rm")
    return train_ensemble(config, 3, rows[:100], rows[100:], {}).path


@pytest.mark.slow
def test_an_ensemble_is_the_mean_of_its_members_normalized_scores(ensemble_folder: Path) -> None:
    ensemble = load_reward_model(ensemble_folder)
    members = [RewardModel.from_pretrained(ensemble_folder / f"member-{index}") for index in range(3)]
    alone = torch.tensor([member(PROMPTS, RESPONSES) for member in members], dtype=torch.float64)
    assert_close(ensemble(PROMPTS, RESPONSES), alone.mean(dim=0).tolist(), atol=1e-6, rtol=0)
    cautious = load_reward_model(ensemble_folder, caution=2.0)
    expected = alone.mean(dim=0) - 2.0 * alone.std(dim=0)
    assert_close(cautious(PROMPTS, RESPONSES), expected.tolist(), atol=1e-6, rtol=0)


def test_a_finished_ensemble_is_not_trained_again(ensemble_folder: Path, tiny_base: Path) -> None:
    rows = as_comparisons(preference_rows(140), "rows")
    config = tiny_config(tiny_base, ensemble_folder, resume=True)
    before = {path: path.stat().st_mtime_ns for path in ensemble_folder.rglob("*")}
    found = train_ensemble(config, 3, rows[:100], rows[100:], {})
    assert found.path == ensemble_folder and found.metrics == Contract.read(ensemble_folder).metrics
    assert {path: path.stat().st_mtime_ns for path in ensemble_folder.rglob("*")} == before
    with pytest.raises(ValueError, match=r"finished model of 3 members, got members=2"):
        train_ensemble(config, 2, rows[:100], rows[100:], {})


def test_members_of_an_ensemble_differ(ensemble_folder: Path) -> None:
    ensemble = load_reward_model(ensemble_folder)
    assert isinstance(ensemble, EnsembleRewardModel)
    first, second, _ = ensemble.member_scores(PROMPTS, RESPONSES)
    assert first != second


def test_an_ensemble_loads_again_with_equal_scores(ensemble_folder: Path) -> None:
    first, second = load_reward_model(ensemble_folder), load_reward_model(ensemble_folder)
    assert first(PROMPTS, RESPONSES) == second(PROMPTS, RESPONSES)
    assert not list(ensemble_folder.parent.glob("*.members")), "the members' working folders are gone"


def test_saving_an_ensemble_loses_nothing_where_it_is_stopped(
    ensemble_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the members nor an earlier ensemble: each is whole at every moment, at its place or beside it."""
    members = [ensemble_folder / f"member-{index}" for index in range(3)]
    expected = load_reward_model(ensemble_folder)(PROMPTS, RESPONSES)
    output = tmp_path / "rm"
    save_ensemble(members[:2], output, {})
    before = load_reward_model(output)(PROMPTS, RESPONSES)
    rename = Path.rename
    for stop in range(2):
        renames = iter(range(stop))

        def interrupted(path: Path, target: Path, renames: Any = renames) -> Path:
            if next(renames, None) is None:
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_ensemble(members, output, {})
        monkeypatch.undo()
        recover_replaced_folder(output)
        assert load_reward_model(output)(PROMPTS, RESPONSES) == before
        assert load_reward_model(ensemble_folder)(PROMPTS, RESPONSES) == expected
    save_ensemble(members, output, {})
    assert load_reward_model(output)(PROMPTS, RESPONSES) == expected and [*tmp_path.iterdir()] == [output]


def test_caution_needs_an_ensemble(trained_folder: Path, reward_model: RewardModel) -> None:
    with pytest.raises(ContractError, match="caution"):
        load_reward_model(trained_folder, caution=1.0)
    with pytest.raises(ValueError, match="two or more members"):
        EnsembleRewardModel([reward_model])
