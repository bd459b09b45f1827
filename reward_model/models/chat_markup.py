"""Recognize texts that a chat template has rendered already, so that it is not applied again."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlhf_ppo.chat.messages import Text
from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.chat.template import render_chat

COMMON_MARKUP = ("<|im_start|>", "[INST]", "<start_of_turn>", "<|start_header_id|>", "<|user|>")
"""What common chat templates write before a message."""
_SHORTEST = 4
"""Characters of the shortest markup that can be told from ordinary text."""


class WholeText(str):
    """Prompt and response in one text, with or without chat markup, as OpenRLHF sends them; `prompt` is its start."""

    prompt: str

    def __new__(cls, text: str, prompt: str = "") -> "WholeText":
        whole = super().__new__(cls, text)
        whole.prompt = prompt
        return whole


@dataclass(frozen=True, kw_only=True)
class ChatMarkup:
    """What a tokenizer's chat template writes around messages."""

    openings: tuple[str, ...]
    """Before the content of a first message of the user or the system, without BOS."""
    before_answer: tuple[str, ...]
    """Between the last message and the answer: the generation prompt, and what stands there in a conversation."""
    closing: str
    """After the answer."""
    bos: str
    """The BOS token, if the template writes it."""

    def begins(self, text: str) -> bool:
        """Whether `text` begins like a rendered conversation."""
        return text.lstrip().removeprefix(self.bos).lstrip().startswith(self.openings)

    def ends(self, text: str) -> bool:
        """Whether `text` ends like a rendered prompt."""
        return text.rstrip().endswith(self.before_answer)

    def holds_answer(self, text: str) -> bool:
        """Whether an answer begins somewhere in `text`."""
        return any(markup in text for markup in self.before_answer)


def chat_markup(tokenizer: Any) -> ChatMarkup:
    """The markup of the tokenizer's chat template."""
    return _markup(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _markup(tokenizer: Any, _template: str) -> ChatMarkup:
    def render(*roles: str, ask: bool = False) -> str:
        messages = [{"role": role, "content": "\x00"} for role in roles]
        try:
            return render_chat(tokenizer, messages, add_generation_prompt=ask)
        except UnreadableText:  # the template does not take these roles
            return ""

    user, bos = render("user"), tokenizer.bos_token or ""
    openings = [text.removeprefix(bos).split("\x00")[0].strip() for text in (user, render("system", "user"))]
    parts = render("user", "assistant").split("\x00")
    before_answer = (render("user", ask=True).removeprefix(user).strip(), parts[-2].strip() if len(parts) > 2 else "")
    return ChatMarkup(
        openings=tuple(opening for opening in openings if len(opening) >= _SHORTEST),
        before_answer=tuple(text for text in before_answer if len(text) >= _SHORTEST),
        closing=parts[-1],
        bos=bos if bos and user.startswith(bos) else "",
    )


def rendered_text(tokenizer: Any, prompt: str, response: Text) -> str | None:
    """Prompt and response as the chat template writes them, if they are rendered already; None if they are bare.

    Raises:
        UnreadableText: The prompt holds part of the markup, or that of another template.
    """
    markup = chat_markup(tokenizer)
    begins, ends = markup.begins(prompt), markup.ends(prompt)
    if isinstance(response, str):
        whole_response = not prompt and markup.begins(response) and markup.holds_answer(response)
        if whole_response or (begins and ends):
            return complete(tokenizer, prompt + response)
    marked = response if not prompt and isinstance(response, str) and markup.begins(response) else prompt
    if begins or ends or marked.lstrip().startswith((*COMMON_MARKUP, *markup.openings)):
        raise UnreadableText(
            f"the prompt is a text with chat markup already ({marked.strip()[:40]!r}...), but this reward model "
            "renders conversations by a chat template of its own: the score would be that of a template applied twice. "
            "Give it the messages: in PPO, a PromptDataset on a column of messages does."
        )
    return None


def whole_chat(tokenizer: Any, whole: WholeText) -> str | tuple[str, str]:
    """A whole text as the chat template writes it; or (prompt, response) to be rendered, if it has no markup.

    Raises:
        UnreadableText: The markup is that of another template, or it is unknown where the response begins.
    """
    markup = chat_markup(tokenizer)
    if markup.begins(whole) or markup.ends(whole.prompt) or (not whole.prompt and markup.holds_answer(whole)):
        return complete(tokenizer, whole)
    bare = strip_end_tokens(tokenizer, whole)
    prompt = strip_end_tokens(tokenizer, whole.prompt)
    if not prompt or not bare.startswith(prompt) or bare.startswith(COMMON_MARKUP):
        raise UnreadableText(
            f"the text {bare[:40]!r}... is not rendered by the chat template of this reward model, and it is unknown "
            "where its response begins. Send texts that the template has rendered, or the beginning of each text under "
            "'prompts', without markup."
        )
    return prompt, bare[len(prompt) :]


def complete(tokenizer: Any, text: str) -> str:
    """A rendered conversation with BOS and the closing of its last turn, as the template writes them."""
    markup = chat_markup(tokenizer)
    bare = strip_end_tokens(tokenizer, text)
    return markup.bos + bare.removesuffix(markup.closing).removesuffix(markup.closing.rstrip()) + markup.closing


def strip_end_tokens(tokenizer: Any, text: str) -> str:
    """`text` without padding and BOS before it, and padding and end-of-text tokens after it."""
    before = tuple(token for token in (tokenizer.pad_token, tokenizer.bos_token) if token)
    after = tuple(token for token in (tokenizer.pad_token, tokenizer.eos_token) if token)
    while token := next((token for token in before if text.startswith(token)), None):
        text = text.removeprefix(token)
    while token := next((token for token in after if text.endswith(token)), None):
        text = text.removesuffix(token)
    return text
