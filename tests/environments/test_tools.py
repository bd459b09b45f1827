"""Tools: calls are read in the chat template's own format, results are messages, the answer ends the episode."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.environments import EnvironmentFactory, Turn
from rlhf_ppo.environments.adapters import ToolCall, from_tools, from_trl
from rlhf_ppo.environments.adapters.tool_calls import detect_parser, json_calls, tagged_calls
from rlhf_ppo.environments.live import ReplayableEnvironment
from tests.support.tiny_models import tiny_tokenizer

HERMES = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}{% for message in messages %}"
    "<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    "{{ call.function | tojson }}\n</tool_call>{% endfor %}</s>{% endfor %}"
)
LLAMA = HERMES.replace("<tool_call>\n", "").replace("\n</tool_call>", "")
COUNTS = {"called_tool": 0, "calls": 0, "failed_calls": 0}


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


async def look_up(word: str) -> dict[str, str]:
    """Look a word up.

    Args:
        word: What to look up.
    """
    return {"found": word}


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def play(factory: EnvironmentFactory, *replies: str, **columns: Any) -> tuple[Any, list[Turn]]:
    environment = ReplayableEnvironment(factory, {"seed": 7} | columns)
    environment.start()
    return environment.first, [environment.step(reply) for reply in replies]


def tool(name: str, content: str) -> dict[str, str]:
    return {"role": "tool", "name": name, "content": content}


def test_a_call_is_answered_by_a_tool_message_and_a_reply_without_one_ends_the_episode() -> None:
    environment = from_tools(
        [multiply, look_up], tokenizer_with(HERMES), reward=lambda answer, truth, **_: float(answer == truth)
    )
    first, turns = play(
        environment,
        '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>\n'
        '<tool_call>{"name": "look_up", "arguments": {"word": "so"}}</tool_call>',
        "42",
        prompt="6 * 7?", truth="42",
    )  # fmt: skip
    assert first == [{"role": "user", "content": "6 * 7?"}]
    counts = {"called_tool": 1, "calls": 2, "failed_calls": 0}
    assert turns[0] == Turn([tool("multiply", "42"), tool("look_up", '{"found": "so"}')], info=counts)
    assert turns[1] == Turn(reward=1.0, terminated=True, info=counts)


def test_a_result_that_json_cannot_hold_is_read_as_text() -> None:
    def sales() -> dict[Any, int]:
        """Sales of each day."""
        return {(2026, 1): 3}

    call = '<tool_call>{"name": "sales", "arguments": {}}</tool_call>'
    _, (turn,) = play(from_tools([sales], tokenizer_with(HERMES)), call, prompt="?")
    assert turn.observation == [tool("sales", "{(2026, 1): 3}")]
    assert turn.info == {"called_tool": 1, "calls": 1, "failed_calls": 0}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("<tool_call>{multiply}</tool_call>", "a call must be JSON"),
        ("<tool_call>[1]</tool_call>", "no tool"),
        ('<tool_call>{"arguments": {}}</tool_call>', "a call must be"),
        ('<tool_call>{"name": "divide", "arguments": {}}</tool_call>', "there is no tool divide, but multiply"),
        ('<tool_call>{"name": "multiply", "arguments": {"a": 1}}</tool_call>', "missing 1 required"),
        ('<tool_call>{"name": "multiply", "arguments": 3}</tool_call>', "a call must be"),
        ('<tool_call>{"name": "multiply"', "a call must be JSON"),
    ],
)
def test_a_wrong_call_is_answered_by_its_error(reply: str, error: str) -> None:
    _, (turn,) = play(from_tools([multiply], tokenizer_with(HERMES)), reply, prompt="?")
    assert isinstance(turn.observation, list)
    assert error in turn.observation[0]["content"]
    assert not turn.terminated
    assert turn.info["failed_calls"] == 1


@pytest.mark.parametrize(
    ("parse", "reply", "arguments"),
    [
        (tagged_calls, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', {"a": 1}),
        (tagged_calls, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', {"a": 1}),
        (tagged_calls, '<think>or <tool_call>{"x"</think>\n<tool_call>{"name": "f", "arguments": {}}', {}),
        (
            tagged_calls,
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n2\n</parameter></function></tool_call>",
            {"a": "1\n2"},
        ),
        (tagged_calls, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", {"a": "1"}),
        (json_calls, '{"name": "f", "parameters": {"a": 1}}', {"a": 1}),
        (json_calls, ' [{"name": "f", "arguments": {"a": 1}}]', {"a": 1}),
    ],
)
def test_each_format_is_read(parse: Any, reply: str, arguments: dict[str, Any]) -> None:
    assert parse(reply) == [ToolCall("f", arguments)]


@pytest.mark.parametrize("parse", [tagged_calls, json_calls])
@pytest.mark.parametrize("reply", ["", "42", "f(1)", "<think>{</think> so 42"])
def test_an_answer_is_no_call(parse: Any, reply: str) -> None:
    assert parse(reply) == []


def test_the_reader_is_that_of_the_templates_own_calls() -> None:
    assert detect_parser(tokenizer_with(HERMES)) is tagged_calls
    assert detect_parser(tokenizer_with(LLAMA)) is json_calls
    with pytest.raises(ValueError, match=r"no reply would be read as a call.*parse"):
        detect_parser(tokenizer_with("{{ messages[0].content }}call look_up(word, 3)"))


def test_arguments_of_formats_without_types_get_those_of_the_schema() -> None:
    reply = "<tool_call><function=multiply><parameter=a>6</parameter><parameter=b>7</parameter></function></tool_call>"
    _, (turn,) = play(from_tools([multiply, look_up], tokenizer_with(HERMES)), reply, prompt="?")
    assert turn.observation == [tool("multiply", "42")]
    reply = "<tool_call><function=look_up><parameter=word>6</parameter></function></tool_call>"
    _, (turn,) = play(from_tools([multiply, look_up], tokenizer_with(HERMES)), reply, prompt="?")
    assert turn.observation == [tool("look_up", '{"found": "6"}')]


@pytest.mark.parametrize(
    ("written", "received"), [("False", "False"), ("true", "True"), ("None", "None"), ("0", "0"), ("maybe", "'maybe'")]
)
def test_truth_values_are_read_as_json_or_python_write_them(written: str, received: str) -> None:
    def switch(on: bool) -> str:
        """Switch the light.

        Args:
            on: Whether it burns.
        """
        return repr(on)

    reply = f"<tool_call><function=switch><parameter=on>\n{written}\n</parameter></function></tool_call>"
    _, (turn,) = play(from_tools([switch], tokenizer_with(HERMES)), reply, prompt="?")
    assert turn.observation == [tool("switch", received)]


@pytest.mark.parametrize(
    ("written", "received"),
    [
        ('[{"to": "Rome"}]', "[{'to': 'Rome'}]"),
        ("[{'to': 'Rome', 'on': None}]", "[{'to': 'Rome', 'on': None}]"),
        ("[]", "[]"),
        ("Rome", "'Rome'"),
    ],
)
def test_lists_and_objects_are_read_as_json_or_python_write_them(written: str, received: str) -> None:
    def travel(legs: list) -> str:
        """Book a journey.

        Args:
            legs: Where to, one after the other.
        """
        return repr(legs)

    reply = f"<tool_call><function=travel><parameter=legs>\n{written}\n</parameter></function></tool_call>"
    _, (turn,) = play(from_tools([travel], tokenizer_with(HERMES)), reply, prompt="?")
    assert turn.observation == [tool("travel", received)]


def test_several_calls_in_one_reply_are_all_answered() -> None:
    calls = [f'{{"name": "multiply", "parameters": {{"a": 6, "b": {b}}}}}' for b in (7, 8)]
    for separator in ("; ", ";", "\n"):
        _, (turn,) = play(from_tools([multiply], tokenizer_with(LLAMA)), separator.join(calls), prompt="?")
        assert turn.observation == [tool("multiply", "42"), tool("multiply", "48")]


def test_a_template_that_hides_the_tools_or_their_results_is_refused() -> None:
    for template in (HERMES.replace("{{ tool | tojson }}", ""), "{{ tools | tojson }}{{ messages[0].content }}"):
        with pytest.raises(ValueError, match=r"shows the tools.*Set another chat_template"):
            from_tools([multiply], tokenizer_with(template))
    with pytest.raises(ValueError, match="got 0 tools"):
        from_tools([], tokenizer_with(HERMES))


class Counter:
    """TRL's interface: public methods are tools."""

    def reset(self, start: int) -> str:
        self.count = start
        return f" Count from {start}."

    def increment(self, step: int) -> int:
        """Count on.

        Args:
            step: How far.
        """
        self.count += step
        return self.count

    def _private(self) -> None: ...

    def get_reward(self) -> float:
        return float(self.count)


def test_trls_environments_give_their_methods_as_tools_and_their_reward_at_the_end() -> None:
    environment = from_trl(Counter, tokenizer_with(HERMES), tools=[multiply])
    first, turns = play(
        environment, '<tool_call>{"name": "increment", "arguments": {"step": 2}}</tool_call>', "done",
        prompt=[{"role": "system", "content": "Go."}, {"role": "user", "content": "Please."}], start=3,
    )  # fmt: skip
    assert first[-1]["content"] == "Please. Count from 3."
    assert turns[0].observation == [tool("increment", "5")]
    assert (turns[1].reward, turns[1].terminated) == (5.0, True)
    made: Any = environment()
    made.reset(prompt="", start=1)
    names = [schema["function"]["name"] for schema in made.chat_template_kwargs["tools"]]
    assert names == ["multiply", "increment"]


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL ships the chat templates of many models")
@pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("qwen2_5", tagged_calls), ("qwen3", tagged_calls), ("qwen3_instruct_2507", tagged_calls),
        ("qwen3_5_think", tagged_calls), ("qwen3_8", tagged_calls), ("nemotron_3_nano", tagged_calls),
        ("glm4moe", tagged_calls), ("llama3_1", json_calls), ("llama3_2", json_calls),
        ("lfm2_v2", None), ("gptoss", None), ("gemma3", None),
    ],
)  # fmt: skip
def test_chat_templates_of_models_are_read_or_refused(name: str, parser: Any) -> None:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    template = (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(template)
    if parser is None:
        with pytest.raises(ValueError, match="chat_template"):
            from_tools([multiply], tokenizer)
    else:
        assert detect_parser(tokenizer) is parser
        from_tools([multiply], tokenizer)
