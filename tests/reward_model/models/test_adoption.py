"""Reward models of other makers, without our contract: their scores are the models' own."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Qwen3Config,
)

from reward_model import ContractError, RewardModel
from reward_model.adopt import main as adopt
from reward_model.evaluate import main as evaluate
from reward_model.models.contract import CONTRACT_FILE
from reward_model.models.ensemble import load_reward_model
from reward_model.score import main as score
from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.reward_model.conftest import classifier, preference_rows, saved, serving
from tests.support.patience import PATIENCE
from tests.support.tiny_models import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE, tiny_gpt2, tiny_tokenizer

PROMPTS = ["The movie was ", "", "My morning "]
RESPONSES = ["great", "awful and boring, what a disappointment", "good"]
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "bert": BertConfig(**SIZES),
    "deberta": DebertaV2Config(**SIZES),
}


@torch.inference_mode()
def own_scores(model: Any, rows: list[list[int]], label: int = 0) -> list[float]:
    """What the model itself says, text by text."""
    return [model(torch.tensor([row])).logits[0, label].item() for row in rows]


def plain_rows(*, eos: bool = True) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    texts = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    return [tokenizer(text)["input_ids"] + [EOS_TOKEN_ID] * eos for text in texts]


def chat_rows() -> list[list[int]]:
    """trl and Skywork: the chat template, nothing else."""
    return [tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in chat_texts()]


def chat_texts() -> list[str]:
    users = [f"user: {prompt}\n" if prompt else "" for prompt in PROMPTS]
    return [f"{user}assistant: {response}\n" for user, response in zip(users, RESPONSES, strict=True)]


@pytest.mark.parametrize("pad", [PAD_TOKEN_ID, EOS_TOKEN_ID, None], ids=["pad", "pad-is-eos", "no-pad"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_with_one_label_gives_its_own_scores(name: str, pad: int | None, tmp_path: Path) -> None:
    """trl's rule for plain text: prompt, response, end-of-text token. A decoder reads its score before padding."""
    model = classifier(CONFIGS[name], pad=pad)
    adopted = RewardModel.from_pretrained(saved(model, tmp_path))
    assert_close(adopted(PROMPTS, RESPONSES), own_scores(model, plain_rows()), atol=1e-6, rtol=1e-6)


def test_padding_moves_an_encoders_score_by_rounding_alone(tmp_path: Path) -> None:
    """ModernBERT's attention takes another route with a mask: 1e-6 in float32, alone nothing, in float64 1e-15."""
    config = ModernBertConfig(**SIZES, local_attention=8, classifier_pooling="mean", pad_token_id=PAD_TOKEN_ID)
    folder = saved(classifier(config), tmp_path)
    for dtype, batch in ((torch.float32, [[0], [1], [2]]), (torch.float64, [[0, 1, 2]])):
        model = RewardModel.from_pretrained(folder, dtype=dtype)
        found = [s for rows in batch for s in model([PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows])]
        expected = torch.tensor(own_scores(model.model, plain_rows())).float().tolist()
        assert_close(found, expected, atol=0, rtol=1e-7)


def test_a_classifier_with_a_chat_template_gets_messages(tmp_path: Path) -> None:
    """As Skywork's reward models and trl's conversational ones."""
    model = classifier(CONFIGS["llama"])
    adopted = RewardModel.from_pretrained(saved(model, tmp_path, chat=True))
    assert_close(adopted(PROMPTS, RESPONSES), own_scores(model, chat_rows()), atol=1e-6, rtol=1e-6)


def test_a_classifier_with_several_labels_scores_by_the_chosen_one(tmp_path: Path) -> None:
    model = classifier(CONFIGS["bert"], labels=3)
    model.config.id2label = {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}
    folder = saved(model, tmp_path)
    expected = own_scores(model, plain_rows(eos=False), label=2)
    for label in ("positive", 2, "2"):
        assert_close(load_reward_model(folder, label=label)(PROMPTS, RESPONSES), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ContractError, match=r"3 labels: 0 \(NEGATIVE\), 1 \(NEUTRAL\), 2 \(POSITIVE\).*--label"):
        load_reward_model(folder)
    with pytest.raises(ContractError, match="no label 'funny', only 0"):
        load_reward_model(folder, label="funny")


@torch.inference_mode()
def openrlhf_scores(base: Any, head: nn.Linear, rows: list[list[int]], *, mean: float, std: float) -> list[float]:
    """OpenRLHF's formula: the head at the last token, normalized by mean and std."""
    values = [head(base(torch.tensor([row])).last_hidden_state)[0, -1, 0].item() for row in rows]
    return [(value - mean) / std for value in values]


@pytest.mark.parametrize("prefix", ["value_head", "score"])
@pytest.mark.parametrize("pad", [PAD_TOKEN_ID, EOS_TOKEN_ID], ids=["pad", "pad-is-eos"])
@pytest.mark.parametrize("normalized", [True, False])
def test_openrlhf_reward_models_give_their_formula(prefix: str, pad: int, normalized: bool, tmp_path: Path) -> None:
    model = classifier(CONFIGS["llama"], pad=pad)
    folder = saved(model, tmp_path, chat=True)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("score.", f"{prefix}."): value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for name in ("id2label", "label2id", "num_labels"):
        config.pop(name, None)
    config |= {"architectures": ["RewardModel"], "value_head_prefix": prefix, "mean": 0.7, "std": 2.5}
    (folder / "config.json").write_text(json.dumps(config | {"normalize_reward": normalized}))
    texts = [text.rstrip("\n") for text in chat_texts()]
    rows = [tiny_tokenizer()(text)["input_ids"] + [EOS_TOKEN_ID] for text in texts]
    mean, std = (0.7, 2.5) if normalized else (0.0, 1.0)
    expected = openrlhf_scores(model.model, model.score, rows, mean=mean, std=std)
    assert_close(RewardModel.from_pretrained(folder)(PROMPTS, RESPONSES), expected, atol=1e-6, rtol=1e-6)


def test_trl_adapters_give_the_scores_of_the_adapted_model(tmp_path: Path) -> None:
    base = classifier(CONFIGS["gpt2"])
    saved(base, tmp_path / "base")
    lora = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["c_attn"], modules_to_save=["score"], fan_in_fan_out=True
    )
    adapted: Any = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), lora).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                nn.init.normal_(weight, std=0.2)
    saved(adapted, tmp_path / "adapter")
    adopted = RewardModel.from_pretrained(tmp_path / "adapter")
    assert_close(adopted(PROMPTS, RESPONSES), own_scores(adapted, plain_rows()), atol=1e-6, rtol=1e-6)


CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class BagConfig(PreTrainedConfig):
    model_type = "bag_of_words"

    def __init__(self, vocab_size=0, **options):
        super().__init__(**options)
        self.vocab_size = vocab_size


class BagForRewardModel(PreTrainedModel):
    config_class = BagConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, 8)
        self.score = nn.Linear(8, 1)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, **_):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scores = self.score(self.words(input_ids)).squeeze(-1)
        return SequenceClassifierOutput(logits=(scores * mask).sum(dim=1, keepdim=True))
"""


@pytest.mark.parametrize("auto_class", ["AutoModelForSequenceClassification", "AutoModel"])
def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(
    auto_class: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's math reward models register their class as AutoModel. The score is the sum of its words' weights."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / f"bag_{auto_class}"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "code.py").write_text(CODE)
    torch.manual_seed(0)
    words, head, bias = torch.randn(VOCAB_SIZE, 8), torch.randn(1, 8), torch.randn(1)
    weights = {"words.weight": words, "score.weight": head, "score.bias": bias}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code = {"AutoConfig": "code.BagConfig", auto_class: "code.BagForRewardModel"}
    config = {
        "model_type": "bag_of_words", "architectures": ["BagForRewardModel"], "vocab_size": VOCAB_SIZE,
        "pad_token_id": PAD_TOKEN_ID, "auto_map": code,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContractError, match=r"comes with Python code of its own.*--trust_remote_code"):
        load_reward_model(folder)
    model = load_reward_model(folder, trust_remote_code=True)
    expected = [float(sum(head[0] @ words[i] + bias[0] for i in row)) for row in plain_rows()]
    assert_close(model(PROMPTS, RESPONSES), expected, atol=1e-5, rtol=0)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "response": RESPONSES[0]}) + "\n")
    command = [str(folder), "--data", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(ContractError, match="trust_remote_code"):
        score(command)
    assert score([*command, "--trust_remote_code"]) == pytest.approx(expected[:1], abs=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path: Path, tiny_base: Path, trained_folder: Path) -> None:
    with pytest.raises(ContractError, match=r"no reward head.*score\.weight.*random numbers"):
        RewardModel.from_pretrained(tiny_base)
    with pytest.raises(ContractError, match="There is no folder"):
        RewardModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ContractError, match="nobody/nothing could not be loaded"):
        RewardModel.from_pretrained("nobody/nothing")
    with pytest.raises(ContractError, match="Leave label out"):
        RewardModel.from_pretrained(trained_folder, label=0)


def test_an_inferred_contract_is_logged_and_can_be_written_and_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(classifier(CONFIGS["bert"], labels=2), tmp_path, chat=True)
    with caplog.at_level(logging.WARNING):
        inferred = RewardModel.from_pretrained(folder, label=1)
    assert "has no reward_model.json" in caplog.text and "template chat" in caplog.text and "logit 1" in caplog.text
    contract = adopt([str(folder), "--label", "LABEL_1", "--write"])
    assert json.loads(capsys.readouterr().out.split("written:")[0])["label"] == 1
    caplog.clear()
    written = RewardModel.from_pretrained(folder)
    assert not caplog.records and written.contract == contract == inferred.contract
    assert written(PROMPTS, RESPONSES) == inferred(PROMPTS, RESPONSES)
    changed = adopt([str(folder), "--label", "1", "--template", "plain", "--max_length", "16", "--write"])
    assert RewardModel.from_pretrained(folder).contract == changed and changed.text.template == "plain"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ContractError, match="field tokenizer_sha256"):
        RewardModel.from_pretrained(folder)


def test_the_contract_that_training_wrote_is_not_replaced(trained_folder: Path) -> None:
    before = (trained_folder / CONTRACT_FILE).read_bytes()
    with pytest.raises(ValueError, match=r"was written by training.*lose the normalization"):
        adopt([str(trained_folder), "--write"])
    assert (trained_folder / CONTRACT_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--max_length", "2048"], "is 2048, the model has 128 positions"), (["--template", "chat"], "no chat template")],
)
def test_a_contract_that_the_model_cannot_keep_is_not_written(option: list[str], message: str, tmp_path: Path) -> None:
    folder = saved(classifier(CONFIGS["gpt2"]), tmp_path)
    with pytest.raises(ContractError, match=message):
        adopt([str(folder), *option, "--write"])
    contract = adopt([str(folder)])
    replace(contract, text=replace(contract.text, max_length=2048)).write(folder)
    with pytest.raises(ContractError, match="is 2048, the model has 128 positions"):
        RewardModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "deberta"])
def test_rotary_and_relative_positions_go_on_beyond_those_of_the_training(name: str, tmp_path: Path) -> None:
    relative = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    config = CONFIGS["llama"] if name == "llama" else DebertaV2Config(**SIZES, **relative)
    folder = saved(classifier(config), tmp_path)
    adopt([str(folder), "--max_length", "300", "--write"])
    text = "good " * 50
    row = tiny_tokenizer()(text)["input_ids"] + [EOS_TOKEN_ID]
    assert 128 < len(row) < 300
    model = RewardModel.from_pretrained(folder)
    assert model([""], [text]) == pytest.approx(own_scores(classifier(config), [row]), abs=1e-5)


def test_a_sample_without_tokens_is_refused_and_set_aside_on_request(tmp_path: Path) -> None:
    """A classifier of several labels gets no end-of-text token."""
    folder = saved(classifier(CONFIGS["gpt2"], labels=2), tmp_path / "rm")
    with pytest.raises(ValueError, match="sample 1: prompt and response have no tokens"):
        RewardModel.from_pretrained(folder, label="1")(["", ""], ["good", ""])
    rows = [{"prompt": "", "response": text} for text in ("good", "", "bad")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(folder), "--label", "1", "--data", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "o")]
    with pytest.raises(ValueError, match=r"texts\.jsonl:2: prompt and response have no tokens"):
        score(command)
    assert len(score([*command, "--on_bad_row", "skip"])) == 2


def test_an_adopted_model_works_in_every_command_and_in_ppo(tmp_path: Path) -> None:
    folder = saved(classifier(CONFIGS["gpt2"]), tmp_path / "rm")
    model = load_reward_model(folder)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preference_rows(8)))
    assert evaluate([str(folder), "--data", str(tmp_path / "pairs.jsonl"), "--page", "none"])["pairs"] == 8
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "response": RESPONSES[0]}) + "\n")
    scores = score([str(folder), "--data", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "out.jsonl")])
    assert scores == model(PROMPTS[:1], RESPONSES[:1])
    with serving(model) as url:
        body = {"prompts": PROMPTS[:1], "responses": RESPONSES[:1]}
        assert requests.post(f"{url}/score", json=body, timeout=PATIENCE).json() == {"scores": scores}
    tokenizer = tiny_tokenizer()
    prompts = PromptDataset(datasets.Dataset.from_dict({"prompt": ["The movie"] * 4}), tokenizer)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4), policy, None, tokenizer, dataset=prompts)
    state = trainer.train(model, TrainConfig(iterations=1, sampling=SamplingConfig(max_new_tokens=4)))
    assert state.metrics["env/reward/RewardModel_mean"] == pytest.approx(state.metrics["env/reward_mean"])
