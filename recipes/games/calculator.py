"""Products of two numbers from 32 to 99, with a calculator as the tool that works them out."""

import random
import re

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_ppo.environments import EnvironmentFactory
from rlhf_ppo.environments.adapters import from_tools

CALL, CALL_END = '<tool_call>{"name": "calculator", "arguments": {"expression": "', '"}}</tool_call>'
MARKS = ["<|user|>", "<|assistant|>", "<|tool|>"]
CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def calculator(expression: str) -> int:
    """Multiply two numbers.

    Args:
        expression: The product, such as 12*34.
    """
    left, right = expression.split("*")
    return int(left) * int(right)


def right_answer(answer: str, truth: str, **_: object) -> float:
    """1 for the right number, and nothing else, as the answer."""
    return float(answer == truth)


def make_environment(tokenizer: PreTrainedTokenizerBase) -> EnvironmentFactory:
    """The calculator as a tool; the columns of a prompt are `prompt` and `truth`."""
    return from_tools([calculator], tokenizer, reward=right_answer)


def problem(generator: random.Random) -> dict[str, str]:
    """A question and its answer, which has four digits."""
    left, right = generator.randint(32, 99), generator.randint(32, 99)
    return {"prompt": f"{left}*{right}", "truth": str(left * right)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit and mark, one for the start of a call and one for its end."""
    words = ["<pad>", "<|end|>", "<unk>", "calculator", CALL, CALL_END, *MARKS, "*", *"0123456789"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("|".join(map(re.escape, words))), "isolated")
    tokenizer.decoder = decoders.Fuse()
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>"
    )
    result.chat_template = CHAT_TEMPLATE
    return result


def transcript(generator: random.Random, *, calls: float = 0.25) -> str:
    """A question, and a guess; or, with probability `calls`, a call, whose result is the answer."""
    asked = problem(generator)
    text = f"calculator<|user|>{asked['prompt']}<|end|><|assistant|>"
    if generator.random() >= calls:
        return f"{text}{problem(generator)['truth']}<|end|>"
    called = f"{CALL}{asked['prompt']}{CALL_END}<|end|><|tool|>{asked['truth']}<|end|><|assistant|>"
    return f"{text}{called}{asked['truth']}<|end|>"
