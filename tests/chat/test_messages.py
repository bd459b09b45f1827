"""One reading of texts and conversations: what is said comes out once, in one form, or is refused by field."""

import datetime
from typing import Any

import pytest

from rlhf_ppo.chat.cells import parse_cell
from rlhf_ppo.chat.messages import is_empty, read_messages, read_text, read_tools
from rlhf_ppo.chat.nested import UnreadableText

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def test_a_text_stays_as_it_is_and_a_single_message_becomes_a_list() -> None:
    assert read_text(" as it is\n", "prompt") == " as it is\n"
    assert read_text({"role": "user", "content": "hi"}, "prompt") == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "content",
    [
        "good film",
        [{"type": "text", "text": "good film"}],
        [{"type": "text", "text": "good "}, {"type": "text", "text": "film", "image_url": None}],
        ["good ", "film"],
        {"type": "text", "text": "good film"},
    ],
)
def test_parts_of_text_are_the_text_that_they_hold(content: Any) -> None:
    assert read_messages([{"role": "user", "content": content}], "prompt") == [{"role": "user", "content": "good film"}]


def test_every_field_of_a_message_is_kept() -> None:
    turn = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL], "name": "a"}
    assert read_messages([turn], "chosen") == [turn]


def test_a_message_that_only_calls_a_tool_needs_no_content() -> None:
    for turn in (
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ):
        (message,) = read_messages([turn], "chosen")
        assert message == {"role": "assistant", "content": None, "tool_calls": [CALL]}
        assert not is_empty([message])


def test_nulls_that_fill_a_columns_schema_are_taken_out_at_every_depth() -> None:
    filled = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "a": None}}, "id": None}
    turn = {"role": "assistant", "content": "x", "tool_calls": [filled], "name": None}
    assert read_messages([turn], "chosen") == [{"role": "assistant", "content": "x", "tool_calls": [CALL]}]
    assert read_messages([{"role": "user", "content": "x", "tool_calls": None}], "prompt") == [
        {"role": "user", "content": "x"}
    ]
    schema = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}, "b": None}}}}
    assert read_tools([schema], "tools") == [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}
    ]


def test_a_call_without_arguments_has_none() -> None:
    call = {"function": {"name": "now", "arguments": None}}
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}], "chosen")
    assert message["tool_calls"] == [{"function": {"arguments": {}, "name": "now"}}]


def test_sharegpt_turns_become_messages() -> None:
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sunny."},
    ]
    assert read_messages(turns, "prompt") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sunny."},
    ]


def test_reading_twice_is_reading_once() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    once = read_messages(turns, "prompt")
    assert read_messages(once, "prompt") == once


def test_a_date_in_a_message_becomes_text() -> None:
    turn = {"role": "user", "content": "x", "timestamp": datetime.date(2024, 5, 1)}
    assert read_messages([turn], "prompt")[0]["timestamp"] == "2024-05-01"


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "field 'chosen' must be text or a list of chat messages, got int"),
        (None, "field 'chosen' must be text or a list of chat messages, got NoneType"),
        ([], "field 'chosen' is an empty list"),
        (["hi"], r"field chosen\[0\] must be a message with 'role' and 'content', got str"),
        ([{"content": "x"}], r"field chosen\[0\] must have 'role' and 'content', got \['content'\]"),
        ([{"role": "assistant"}], r"field chosen\[0\] must have 'content' \(or 'tool_calls'\).*leave the message out"),
        ([{"role": "user", "content": None, "tool_calls": []}], "must have 'content'"),
        ([{"role": "user", "content": 5}], "'content' must be text or parts of text, got int"),
        ([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}], "part of type 'image'.*Replace the part"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part of type 'image_url'"),
        ([{"from": "narrator", "value": "x"}], "'from' is 'narrator', which is no known speaker"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
            r"tool_calls\[0\] must name a function",
        ),
        ("half \ud83d", r"holds '\\ud83d' at character 5, half of a character.*cut the text at whole characters"),
        ([{"role": "user", "content": "\ud83d"}], "half of a character"),
        ([{"role": "user", "content": "x", "extra": {"a": "\udc00"}}], "half of a character"),
        ([{"role": "user", "content": "x", "extra": deep(100)}], "nested more than 64 levels deep"),
        (
            [{"role": "user", "content": "x", "extra": b"x"}],
            "must be text, a number, a list or named fields, got bytes",
        ),
        ([{"role": "user", "content": "x", 5: "x"}], "has a field named 5"),
    ],
)
def test_what_cannot_be_read_is_refused_by_field_and_reason(value: Any, message: str) -> None:
    with pytest.raises(UnreadableText, match=message):
        read_text(value, "chosen")


def test_tools_are_a_list_of_schemas_or_its_json() -> None:
    assert read_tools('[{"type": "function"}]', "tools") == [{"type": "function"}]
    assert read_tools(None, "tools") is read_tools("", "tools") is read_tools([], "tools") is None
    for wrong in ("search the web", [5], {"name": "f"}):
        with pytest.raises(UnreadableText, match="field 'tools' must be a list of tool schemas"):
            read_tools(wrong, "tools")


@pytest.mark.parametrize(
    "cell",
    [
        '[{"role": "user", "content": "Hi\\n"}]',
        "[{'role': 'user', 'content': 'Hi\\n'}]",
        "[{'content': 'Hi\\n', 'role': 'user'}]",
    ],
)
def test_a_conversation_in_a_cell_of_a_table_is_read_as_json_or_as_python_writes_it(cell: str) -> None:
    assert parse_cell(cell, "chosen") == [{"role": "user", "content": "Hi\n"}]


def test_a_cell_that_only_looks_like_a_conversation_is_refused_and_plain_text_is_left_alone() -> None:
    as_numpy_writes_it = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Ho'}]"
    with pytest.raises(UnreadableText, match=r"field 'chosen' looks like a conversation written as text.*json.dumps"):
        parse_cell(as_numpy_writes_it, "chosen")
    for text in ("[1] is a footnote", '{"a": 1}', "It was [good]", ""):
        assert parse_cell(text, "chosen") == text
