"""Training, scoring and PPO prompts read a row alike; what none of them can read is a bad row everywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from reward_model import BadRow, RewardModel, TextRule
from reward_model.data.comparisons import parse_row
from reward_model.models.encoding import encode_comparisons
from reward_model.models.text import encode
from reward_model.train import main
from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

QUESTION = {"role": "user", "content": "Weather?"}
RULE = TextRule(template="chat", append_eos=False, max_length=120)
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.name }}]{{ '\\n' }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.reasoning_content %}<{{ m.reasoning_content }}>{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def call(city: str, **more: Any) -> dict[str, Any]:
    arguments = {"city": city, **more}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def trained_and_scored(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The texts that training sees for a row's completions, and those that scoring sees."""
    tokenizer = chat_tokenizer()
    encoded = encode_comparisons([parse_row(row, "row 0")], tokenizer, RULE).dataset[0]
    scored = [
        encode(tokenizer, RULE, row["prompt"], row[name], truncate=True, tools=row.get("tools"))
        for name in ("chosen", "rejected")
    ]
    decode = lambda rows: [tokenizer.decode(ids) for ids in rows]
    return decode([encoded["chosen_ids"], encoded["rejected_ids"]]), decode(scored)


def test_pairs_that_differ_in_a_tool_call_or_in_reasoning_alone_are_told_apart_in_training_as_in_scoring() -> None:
    """R5: the calls were dropped in training and kept in scoring, and the pair was "identical"."""
    trained, scored = trained_and_scored({"prompt": [QUESTION], "chosen": [call("Rome")], "rejected": [call("Paris")]})
    assert trained == scored
    assert trained[0] == 'user: Weather?\nassistant: {"city": "Rome"}\n'
    thinking = [{"role": "assistant", "content": "x", "reasoning_content": thought} for thought in ("yes", "no")]
    trained, scored = trained_and_scored({"prompt": [QUESTION], "chosen": thinking[:1], "rejected": thinking[1:]})
    assert trained == scored == ["user: Weather?\nassistant: x<yes>\n", "user: Weather?\nassistant: x<no>\n"]


@pytest.mark.parametrize("prompt", ["Weather?", [QUESTION]], ids=["text", "messages"])
def test_a_prompt_that_a_whole_conversation_repeats_is_said_once_in_scoring_too(prompt: Any) -> None:
    answers = [[QUESTION, {"role": "assistant", "content": text}] for text in ("sun", "rain")]
    trained, scored = trained_and_scored({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    assert trained == scored == ["user: Weather?\nassistant: sun\n", "user: Weather?\nassistant: rain\n"]
    with pytest.raises(UnreadableText, match="'prompt' is not part of the conversations"):
        encode(chat_tokenizer(), RULE, "Who won?", answers[0], truncate=True)
    two_turns = [QUESTION, {"role": "assistant", "content": "sun"}]
    ids = encode(chat_tokenizer(), RULE, two_turns, [QUESTION, call("Rome")], truncate=True)
    assert chat_tokenizer().decode(ids).count("Weather?") == 2, "asked again, after an answer"


def test_nulls_that_datasets_fills_in_and_a_rows_tools_are_read_as_meant() -> None:
    """R18: `{"city": "Rome", "a": null}` reached the text, and the row's tools did not."""
    other = {"prompt": [QUESTION], "chosen": [call("Oslo", a=1)], "rejected": [call("Bonn")], "tools": None}
    row = {"prompt": [QUESTION], "chosen": [call("Rome")], "rejected": [call("Paris")], "tools": [{"name": "f"}]}
    filled = Dataset.from_list([row, other])[0]
    assert filled["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "a": None}
    trained, scored = trained_and_scored(filled)
    assert trained == scored
    assert trained[0] == '[f]\nuser: Weather?\nassistant: {"city": "Rome"}\n'
    prompts = Dataset.from_list(
        [{"prompt": [QUESTION, call("Rome"), {"role": "tool", "content": "sun"}], "tools": '[{"name": "f"}]'}]
    )
    (text,) = PromptDataset(prompts, chat_tokenizer()).batch([0]).texts
    assert text == '[f]\nuser: Weather?\nassistant: {"city": "Rome"}\ntool: sun\nassistant: '


@pytest.mark.parametrize(
    "question",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Weather?"}]}],
        [{"from": "human", "value": "Weather?"}],
        QUESTION,
        json.dumps([QUESTION]),
        str([QUESTION]),
    ],
    ids=["parts", "from and value", "one message", "JSON text", "Python text"],
)
def test_other_forms_of_a_conversation_read_alike_in_training_scoring_and_prompts(question: Any) -> None:
    """R7: scoring read the Python repr of a list of parts, training refused it."""
    row = {
        "prompt": question,
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"from": "gpt", "value": "b"}],
    }
    expected = ["user: Weather?\nassistant: a\n", "user: Weather?\nassistant: b\n"]
    tokenizer = chat_tokenizer()
    encoded = encode_comparisons([parse_row(row, "row 0")], tokenizer, RULE).dataset[0]
    assert [tokenizer.decode(encoded[name]) for name in ("chosen_ids", "rejected_ids")] == expected
    if not isinstance(question, str):  # a cell of a table, which a sample of scoring is not
        assert trained_and_scored(row)[1] == expected
    (text,) = PromptDataset(Dataset.from_list([{"prompt": question}]), tokenizer).batch([0]).texts
    assert text == "user: Weather?\nassistant: "


def test_tools_that_the_template_does_not_show_are_said(caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": [QUESTION, call("Rome")], "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}
    encode_comparisons([parse_row(row, "row 0")], chat_tokenizer(), RULE)
    assert not caplog.messages
    encode_comparisons([parse_row(row, "row 0")], tiny_tokenizer(chat=True), RULE)
    assert [message.split(" have ")[1].split(",")[0] for message in caplog.messages] == ["tools", "tool_calls"]


WRONG = [
    ([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}], "part of type 'image'"),
    ([{"role": "user"}], "must have 'content'"),
    ([{"role": "user", "content": 5}], "'content' must be text"),
    ([{"from": "narrator", "value": "x"}], "no known speaker"),
    ("half \ud83d", "half of a character"),
]


@pytest.mark.parametrize(("prompt", "message"), WRONG)
def test_what_cannot_be_read_is_refused_by_row_or_sample_everywhere(
    prompt: Any, message: str, reward_model: RewardModel
) -> None:
    """R7, R14."""
    answer = [{"role": "assistant", "content": "a"}] if isinstance(prompt, list) else "a"
    other = [{"role": "assistant", "content": "b"}] if isinstance(prompt, list) else "b"
    with pytest.raises(BadRow, match=f"row 3.*{message}"):
        parse_row({"prompt": prompt, "chosen": answer, "rejected": other}, "row 3")
    with pytest.raises(ValueError, match=f"sample 1.*{message}"):
        reward_model(["ok", prompt], ["ok", "ok"])
    if isinstance(prompt, str):
        return  # a table of pyarrow cannot hold it
    rows = Dataset.from_list([{"prompt": prompt}])
    with pytest.raises(ValueError, match=f"Row 0 of column 'prompt'.*{message}"):
        PromptDataset(rows, chat_tokenizer())


def test_prompts_that_cannot_be_read_are_skipped_and_counted_on_request() -> None:
    good = [QUESTION]
    rows = [
        [{"role": "user", "content": [{"type": "image"}]}],
        good,
        [{"role": "system", "content": [{"type": "text", "text": "x"}]}],
    ]
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    dataset = Dataset.from_list([{"prompt": json.dumps(row)} for row in rows])
    with pytest.raises(ValueError, match="Row 0"):
        PromptDataset(dataset, tokenizer)
    report = PromptDataset(dataset, tokenizer, on_bad_row="skip").report
    assert (report.kept, report.unreadable) == (1, 2)
    assert "2 left out as unreadable" in report.describe()


def test_an_empty_first_row_does_not_decide_what_the_prompts_are() -> None:
    dataset = Dataset.from_list([{"prompt": []}, {"prompt": [QUESTION]}])
    report = PromptDataset(dataset, chat_tokenizer(), on_bad_row="skip").report
    assert (report.form, report.kept, report.unreadable) == ("conversation", 1, 1)
    with pytest.raises(ValueError, match="The conversation in row 0 of column 'prompt' has no turns"):
        PromptDataset(dataset, chat_tokenizer())


@pytest.fixture
def base_without_system_role(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
    ).replace("<{{ m.reasoning_content }}>", "")
    tiny_gpt2().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def chat_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"Film {index}?"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for index in range(count)
    ]


def test_rows_that_the_template_refuses_or_makes_equal_are_bad_rows_with_their_place(
    base_without_system_role: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R6, R19: a template that raises ended in a traceback, also with skip; equal tokens trained at accuracy 0.5."""
    rows = chat_rows(24)
    rows[4]["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    thoughts = [[{"role": "assistant", "content": "x", "reasoning_content": thought}] for thought in ("yes", "no")]
    rows[9] |= {"chosen": thoughts[0], "rejected": thoughts[1]}
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--data", str(data), "--model", str(base_without_system_role), "--output_dir", str(output)]
    arguments += ["--max_length", "64", "--no_progress", "--held_out", "0.2"]
    with pytest.raises(BadRow, match=r"data\.jsonl:(5: .*System role not supported|10: .*same tokens)"):
        main(arguments)
    assert not output.exists()
    main([*arguments, "--on_bad_row", "skip"])
    aside = [json.loads(line) for line in (tmp_path / "out.bad_rows.jsonl").read_text().splitlines()]
    assert sorted(row["where"] for row in aside) == ["data.jsonl:10", "data.jsonl:5"]
    facts = json.loads((output / "reward_model.json").read_text())["data"]
    assert facts["train"] + facts["evaluation"] == 22
    assert facts["train_not_encodable"] + facts["evaluation_not_encodable"] == 2
    assert "2 more could not be encoded" in capsys.readouterr().out
