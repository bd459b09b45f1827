"""Turn prompt and response into token ids, in training and serving alike."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reward_model.data.prompt_split import split_prompt
from reward_model.models.chat_markup import WholeText, rendered_text, strip_end_tokens, whole_chat
from reward_model.models.contract import ContractError, TextRule
from rlhf_ppo.chat.messages import Text, as_messages, read_text, read_tools
from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.chat.prompt import ChatPrompt
from rlhf_ppo.chat.template import render_chat

_CHARACTERS_PER_TOKEN = 8
_SPARE_TOKENS = 64
_WORD_END = re.compile(r"\w(?=\W)")

Texts = Sequence[Any]
"""One `Text` per sample; `encode` reads and checks them."""


def encode(
    tokenizer: Any,
    rule: TextRule,
    prompt: Text,
    response: Text,
    *,
    truncate: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of prompt + response under `rule`.

    Prompt and response are joined as text and tokenized once, as in training: tokens that span the boundary are the
    same in both. The end-of-text token is added by id, so it never depends on how its text would be tokenized.

    Args:
        truncate: Cut the start of a text longer than `rule.max_length` (serving); otherwise return it whole, and the
            caller drops and counts it (training).

    Raises:
        UnreadableText: A text cannot be read, has no tokens, or the chat template refuses the conversation.
    """
    max_length = rule.max_length - 1 if rule.append_eos else rule.max_length
    text = render(tokenizer, rule, prompt, response, tools=tools)
    text = text.rstrip("\n") if rule.strip_newlines else text
    # A chat template writes the special tokens itself.
    options: dict[str, Any] = {"add_special_tokens": rule.template == "plain", "verbose": False}
    bos = tokenizer.bos_token if rule.template == "chat" and text.startswith(tokenizer.bos_token or "\0") else None
    if truncate:
        options |= {"truncation": True, "max_length": max_length}
        text = text_tail(tokenizer, text, tokens=max_length)
    ids = list(tokenizer(text, **options)["input_ids"])
    if bos is not None:  # the cut takes it where the tokenizer has not added it
        ids[0] = tokenizer.bos_token_id
    if rule.append_eos and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise UnreadableText("prompt and response have no tokens: there is nothing to score. Leave the sample out.")
    return ids


def render(
    tokenizer: Any, rule: TextRule, prompt: Text, response: Text, *, tools: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """The text of prompt + response under `rule`, before it is tokenized; arguments and errors as of `encode`."""
    whole = prompt if isinstance(prompt, WholeText) else None
    prompt = prompt.messages if rule.template == "chat" and isinstance(prompt, ChatPrompt) else prompt
    prompt, response = read_text(prompt, "prompt"), read_text(response, "response")
    if whole is not None:
        text = whole_chat(tokenizer, whole) if rule.template == "chat" else strip_end_tokens(tokenizer, whole)
        if isinstance(text, str):
            return text
        prompt, response = text
    if (
        prompt and response and not isinstance(response, str) and response[0]["role"] != "assistant"
    ):  # it may repeat the prompt
        prompt, (response,) = split_prompt(prompt, (response,))
    if rule.template == "chat":
        rendered = rendered_text(tokenizer, prompt, response) if isinstance(prompt, str) else None
        if rendered is not None:
            return rendered
        messages = as_messages(prompt, "user") + as_messages(response, "assistant")
        return render_chat(tokenizer, messages, tools=read_tools(tools, "tools"))
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise ContractError(
            "text.template is 'plain', got a conversation (a list of messages): this reward model was trained on plain "
            "text. Give strings, or train one with template='chat'."
        )
    return prompt + response


def text_tail(tokenizer: Any, text: str, *, tokens: int) -> str:
    """An end of `text` that has its last `tokens` tokens; a text of megabytes need not be tokenized whole.

    It begins where a word ends, at which every tokenizer cuts, and has more tokens than needed, because the first ones
    may differ. Where no word ends, it is trusted if two cuts beside it give the same last tokens; a long run of one
    character, which is cut by counting from its start, does not.
    """
    size = _CHARACTERS_PER_TOKEN * (tokens + _SPARE_TOKENS)
    while size < len(text):
        cut = len(text) - size
        word_end = _WORD_END.search(text, cut, len(text) - size // 2)
        ends = [text[start:] for start in ((cut, cut + 1, cut + 2) if word_end is None else (word_end.end(),))]
        rows = tokenizer(ends, add_special_tokens=False, verbose=False)["input_ids"]
        if min(map(len, rows)) >= tokens + _SPARE_TOKENS:
            return ends[0] if all(row[-tokens:] == rows[0][-tokens:] for row in rows) else text
        size *= 4
    return text


def prepare_tokenizer(tokenizer: Any, rule: TextRule, *, source: str) -> Any:
    """Check that `tokenizer` supports `rule`, and set its padding and truncation sides.

    Raises:
        ContractError: No chat template, no end-of-text token or no padding token where the rule needs one.
    """
    if rule.template == "chat" and not tokenizer.chat_template:
        raise ContractError(
            f"text.template is 'chat', but the tokenizer of {source} has no chat template: conversations cannot be "
            "turned into text. Use a model that has one, set tokenizer.chat_template and save it, or give plain text."
        )
    if rule.append_eos and tokenizer.eos_token_id is None:
        raise ContractError(
            f"text.append_eos is true, but the tokenizer of {source} has no eos_token. Set append_eos=False (encoders "
            "close a text by a separator of their own) or give the tokenizer an eos_token."
        )
    if tokenizer.pad_token_id is None:
        raise ContractError(f"The tokenizer of {source} has no pad_token: texts of unequal length cannot be batched.")
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"  # the response is at the end, and is what is scored
    return tokenizer
