"""Conversations through a chat template: all that they hold, and a reason where the template refuses them."""

import pytest

from rlhf_ppo.chat.messages import read_messages
from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.chat.template import render_chat
from tests.support.tiny_models import tiny_tokenizer

CALL = {"function": {"name": "weather", "arguments": {"city": "Rome", "a": None}}}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
WITH_CALLS = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '\\n' }}{% endfor %}"
)


def test_a_call_reaches_the_text_without_the_nulls_of_its_column_and_no_content_is_not_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_CALLS
    text = render_chat(tokenizer, read_messages(TURNS, "prompt"), tools=[{"name": "weather"}])
    assert text == '[weather]user: Hi\nassistant: {"name": "weather", "arguments": {"city": "Rome"}}\n'


def test_a_template_that_cannot_do_without_content_gets_an_empty_one() -> None:
    tokenizer = tiny_tokenizer(chat=True)  # its template adds the content to the role
    assert render_chat(tokenizer, read_messages(TURNS, "prompt")) == "user: Hi\nassistant: \n"


def test_a_template_that_raises_refuses_the_conversation_by_its_reason() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    with pytest.raises(
        UnreadableText, match=r"roles system, user: System role not supported.*set another chat_template"
    ):
        render_chat(tokenizer, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    tokenizer.chat_template = "{{ messages[7].role + 5 }}"
    with pytest.raises(UnreadableText, match="the chat template refuses"):
        render_chat(tokenizer, [{"role": "user", "content": "y"}])


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Rome"}'),  # Qwen 2.5
        ("{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}", "<city>Rome"),  # Qwen 3.5
        ("{{ '\\n' + c.function.arguments }}", '\n{"city": "Rome"}'),  # DeepSeek V3
        ("{{ c.function.arguments if c.function.arguments is string else c.function.arguments.city }}", "Rome"),
    ],
)
def test_arguments_are_written_once_whether_they_come_as_json_or_as_an_object(
    arguments: object, template: str, written: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}" + template + "{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert render_chat(tokenizer, read_messages(turns, "prompt")) == written


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].tool_calls[0].arguments }}"
    turn = {"role": "assistant", "content": "x", "tool_calls": [{"name": "weather", "arguments": "{city: Rome"}]}
    assert render_chat(tokenizer, read_messages([turn], "prompt")) == "{city: Rome"
