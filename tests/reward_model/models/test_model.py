"""The artifact: the same scores whoever loads it and however texts are packed, and refusals that name the field."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_model import ContractError, RewardModel, TextRule
from reward_model.models.text import encode, prepare_tokenizer
from tests.support.tiny_models import tiny_tokenizer

PROMPTS = ["The movie was ", "The movie was ", "", "My morning "]
RESPONSES = ["great", "awful and boring and terrible, what a disappointment", "lovely", "good good bad"]


def test_kind_words_score_higher(reward_model: RewardModel) -> None:
    good, bad = reward_model(prompts=["The movie was "] * 2, responses=["great good lovely", "awful bad"])
    assert good > bad


def test_auto_classes_load_the_folder_with_identical_scores(reward_model: RewardModel, trained_folder: Path) -> None:
    """The folder is a plain save_pretrained folder; raw scores are its logits, bit for bit."""
    model = AutoModelForSequenceClassification.from_pretrained(trained_folder)
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.inference_mode():
            expected = model(ids).logits.item()
        assert reward_model.raw_scores([prompt], [response]) == [expected]


def test_scores_are_gain_times_raw_plus_bias(reward_model: RewardModel) -> None:
    normalization = reward_model.contract.normalization
    raw = reward_model.raw_scores(PROMPTS, RESPONSES)
    expected = [normalization.gain * value + normalization.bias for value in raw]
    assert reward_model(PROMPTS, RESPONSES) == expected


def test_scores_do_not_depend_on_batch_padding_side_or_order(reward_model: RewardModel, trained_folder: Path) -> None:
    together = reward_model(PROMPTS, RESPONSES)
    alone = [reward_model([prompt], [response])[0] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert_close(together, alone, atol=1e-5, rtol=0)
    assert_close(reward_model(PROMPTS[::-1], RESPONSES[::-1])[::-1], together, atol=1e-5, rtol=0)
    small = RewardModel.from_pretrained(trained_folder, max_tokens=1)
    assert_close(small(PROMPTS, RESPONSES), together, atol=1e-5, rtol=0)
    rows = [
        encode(reward_model.tokenizer, reward_model.contract.text, p, r, truncate=True)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    left = reward_model.left_padded_scores(rows)
    assert left is not None
    assert_close(left, reward_model.score_ids(rows), atol=1e-5, rtol=0)


def test_a_second_load_gives_the_same_scores(reward_model: RewardModel, trained_folder: Path) -> None:
    assert RewardModel.from_pretrained(trained_folder)(PROMPTS, RESPONSES) == reward_model(PROMPTS, RESPONSES)


def test_the_model_never_trains(reward_model: RewardModel) -> None:
    assert not reward_model.model.training


def test_no_texts_give_no_scores(reward_model: RewardModel) -> None:
    assert reward_model([], []) == []


def test_an_empty_response_is_scored_by_its_end_of_text_token(reward_model: RewardModel) -> None:
    assert len(reward_model(["", "a"], ["", ""])) == 2


def test_a_long_prompt_loses_its_beginning_and_never_the_response(reward_model: RewardModel) -> None:
    rule = reward_model.contract.text
    ids = encode(reward_model.tokenizer, rule, "word " * 500, "the end", truncate=True)
    assert len(ids) == rule.max_length
    assert reward_model.tokenizer.decode(ids).endswith("the end<eos>")


def test_the_end_of_text_token_is_appended_once() -> None:
    tokenizer = tiny_tokenizer()
    rule = TextRule(append_eos=True, max_length=32)
    plain = encode(tokenizer, rule, "The movie", " was good", truncate=False)
    already = encode(tokenizer, rule, "The movie", " was good<eos>", truncate=False)
    assert plain == already and plain.count(tokenizer.eos_token_id) == 1
    bare = encode(tokenizer, TextRule(append_eos=False, max_length=32), "The movie", " was good", truncate=False)
    assert plain == [*bare, tokenizer.eos_token_id]


def test_chat_texts_go_through_the_template_once() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    rule = TextRule(template="chat", append_eos=False, max_length=64)
    from_text = encode(tokenizer, rule, "Hello", "Good movie", truncate=False)
    messages = [{"role": "user", "content": "Hello"}], [{"role": "assistant", "content": "Good movie"}]
    assert from_text == encode(tokenizer, rule, *messages, truncate=False)
    assert tokenizer.decode(from_text) == "user: Hello\nassistant: Good movie\n"


def test_a_long_conversation_loses_its_beginning_but_not_its_bos() -> None:
    tokenizer = prepare_tokenizer(tiny_tokenizer(chat=True), TextRule(template="chat", append_eos=False), source="here")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    rule = TextRule(template="chat", append_eos=False, max_length=8)
    whole = encode(tokenizer, rule, "Hello " * 500, "Good movie", truncate=False)
    assert whole[0] == tokenizer.bos_token_id
    cut = encode(tokenizer, rule, "Hello " * 500, "Good movie", truncate=True)
    assert cut == [tokenizer.bos_token_id, *whole[-7:]]


@pytest.mark.parametrize(
    ("prompts", "responses", "error", "message"),
    [
        ("one string", ["a"], TypeError, "lists with one text per sample"),
        (["a", "b"], ["a"], ValueError, "got 2 and 1"),
        (["a"], [None], TypeError, r"responses\[0\] must be a text"),
        (["a"], [3.0], TypeError, r"responses\[0\] must be a text"),
        (["a"], [[{"role": "assistant", "content": "x"}]], ContractError, "trained on plain text"),
    ],
)
def test_wrong_texts_are_named(
    reward_model: RewardModel, prompts: Any, responses: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reward_model(prompts, responses)


def test_a_score_that_is_not_finite_names_the_sample(reward_model: RewardModel) -> None:
    torch.nn.init.constant_(reward_model.model.score.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite for sample 0"):
        reward_model(["a"], ["b"])


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def change_contract(folder: Path, **changes: Any) -> None:
    path = folder / "reward_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format_version": 99}, "format_version"),
        ({"tokenizer_sha256": "0" * 64}, "tokenizer_sha256"),
        ({"head": "classifier.weight"}, "head"),
        ({"kind": "ensemble"}, "kind"),
        ({"text": {"template": "plain", "append_eos": True, "max_length": 4096}}, "max_length"),
        ({"text": {"template": "odd", "append_eos": True, "max_length": 8}}, "text.template"),
        ({"text": {"template": "plain"}, "surprise": 1}, "surprise"),
        ({"text": {"no_such": 1}}, "text"),
        ({"normalization": {"gain": -1.0, "bias": 0.0, "reference": "", "samples": 2}}, "normalization.gain"),
    ],
)
def test_a_contract_that_does_not_match_is_refused_by_field(
    trained_folder: Path, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    folder = copied(trained_folder, tmp_path / "copy")
    change_contract(folder, **changes)
    with pytest.raises(ContractError, match=field):
        RewardModel.from_pretrained(folder)


def test_a_contract_with_the_field_normalisation_of_earlier_versions_is_read(
    trained_folder: Path, tmp_path: Path
) -> None:
    """Versions before 0.2 spelled it so: a reward model of theirs gives the same scores."""
    folder = copied(trained_folder, tmp_path / "copy")
    path = folder / "reward_model.json"
    values = json.loads(path.read_text())
    values["normalisation"] = values.pop("normalization")
    path.write_text(json.dumps(values))
    assert RewardModel.from_pretrained(folder).contract == RewardModel.from_pretrained(trained_folder).contract


def test_a_contract_that_is_no_json_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    folder = copied(trained_folder, tmp_path / "copy")
    (folder / "reward_model.json").write_text("{")
    with pytest.raises(ContractError, match="not valid JSON"):
        RewardModel.from_pretrained(folder)


def test_a_checkpoint_without_its_head_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    """transformers would draw the head at random and only log it."""
    folder = copied(trained_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ContractError, match=r"field head names 'score\.weight'"):
        RewardModel.from_pretrained(folder)


def test_another_tokenizer_in_the_folder_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    folder = copied(trained_folder, tmp_path / "copy")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["surprise"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ContractError, match="tokenizer_sha256"):
        RewardModel.from_pretrained(folder)
