"""`TextEnvironment` and `TextHistory` of TRL's classic (<= 0.11), for scripts that call `run` and then `step()`."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.chat.encoding import decode_tokens, encode_texts, whole_characters


class TextHistory:
    """The text and the tokens of one episode, in segments of the system (prompt, tools) and of the model.

    Args:
        system: Whether the first segment is the system's.
    """

    def __init__(self, text: str, tokens: Tensor, system: bool = True) -> None:
        self.text, self.tokens = "", tokens[:0]
        self.token_masks = tokens[:0]
        """1 at tokens that the model sampled."""
        self.text_spans: list[tuple[int, int]] = []
        self.token_spans: list[tuple[int, int]] = []
        self.system_spans: list[bool] = []
        self.completed, self.truncated, self.reward = False, False, 0.0
        self.append_segment(text, tokens, system=system)

    def append_segment(self, text: str, tokens: Tensor, system: bool = True) -> None:
        """Append a segment; a ValueError if it is empty."""
        if len(text) == 0 or len(tokens) == 0:
            raise ValueError("Can't append empty text or token list to history.")
        self.text_spans.append((len(self.text), len(self.text) + len(text)))
        self.token_spans.append((len(self.tokens), len(self.tokens) + len(tokens)))
        self.system_spans.append(system)
        self.text += text
        self.tokens = torch.cat([self.tokens, tokens])
        self.token_masks = torch.cat([self.token_masks, torch.full_like(tokens, int(not system))])

    def complete(self, truncated: bool = False) -> None:
        """Mark the episode as finished, or as cut off."""
        self.completed, self.truncated = True, truncated

    @property
    def last_text_segment(self) -> str:
        """Text of the last segment."""
        start, end = self.text_spans[-1]
        return self.text[start:end]

    def split_query_response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, response and mask for `PPOTrainer.step`: the first segment, and all that follows."""
        end = self.token_spans[0][1]
        return self.tokens[:end], self.tokens[end:], self.token_masks[end:]


class TextEnvironment:
    """Lets a model call tools in text: `<request><Tool>query<call>` is answered by `result<response>`.

    `PPOTrainer.train(environment=from_tools(...))` does the same with a chat template; this is the classic's form.

    Args:
        model: Samples the replies.
        tokenizer: Its tokenizer.
        tools: Functions of a text, by their names, or a list of objects, which are called by their classes' names.
        reward_fn: Called with the last segment of each episode and the arguments of `run`; returns rewards.
        prompt: Text before each query.
        max_turns: Maximum number of replies.
        max_tool_reponse: Maximum length of a tool's answer, in characters; spelled as in TRL.
        max_length: Maximum length of an episode, in tokens.
        generation_kwargs: Passed to `generate`.
    """

    request_token, call_token, response_token, submit_token = "<request>", "<call>", "<response>", "<submit>"

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        tools: Mapping[str, Callable[[str], Any]] | Sequence[Callable[[str], Any]] = (),
        reward_fn: Callable[..., Sequence[Any]] | None = None,
        prompt: str | None = None,
        max_turns: int = 4,
        max_tool_reponse: int = 100,
        max_length: int | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.prompt, self.reward_fn = model, tokenizer, prompt or "", reward_fn
        self.tools = dict(tools) if isinstance(tools, Mapping) else {type(tool).__name__: tool for tool in tools}
        self.max_turns, self.max_tool_response, self.max_length = max_turns, max_tool_reponse, max_length
        self.generation_kwargs = dict(generation_kwargs or {})

    def run(
        self, queries: Sequence[str], **rewards_kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Any], list[TextHistory]]:
        """Queries, responses, masks and rewards, as `PPOTrainer.step` takes them, and the histories."""
        texts = [self.prompt + query for query in queries]
        histories = [TextHistory(text, self._encode(text, add_special_tokens=True)) for text in texts]
        for _ in range(self.max_turns):
            active = [history for history in histories if not history.completed]
            if not active:
                break
            self.generate(active)
            for history in active:
                if not self._complete_if_ended(history, model_turn=True):
                    self.step(history)
                    self._complete_if_ended(history, model_turn=False)
        self.compute_reward(histories, **rewards_kwargs)
        parts = [history.split_query_response_tokens() for history in histories]
        query_tokens, responses, masks = (list(part) for part in zip(*parts, strict=True))
        return query_tokens, responses, masks, [history.reward for history in histories], histories

    def step(self, history: TextHistory) -> TextHistory:
        """Append the answer of the tool that the last segment calls."""
        tool, query = self.parse_tool_call(history.last_text_segment)
        if tool is None or query is None:
            answer = f"Unknown tool call: {history.last_text_segment}"
        elif tool not in self.tools:
            answer = f"Unknown tool {tool}."
        else:
            try:
                answer = str(self.tools[tool](query))
            except Exception as error:  # of any tool: the model reads it
                answer = f"Tool error: {error}"
        if len(answer) > self.max_tool_response:
            answer = answer[: self.max_tool_response - 3] + "..."
        answer = whole_characters(answer) + self.response_token
        history.append_segment(answer, self._encode(answer, add_special_tokens=False), system=True)
        return history

    def parse_tool_call(self, text: str) -> tuple[str | None, str | None]:
        """Name of the tool and its argument in `<request><Tool>argument<call>`; (None, None) where there is none."""
        found = re.search(f"{self.request_token}(.*?){self.call_token}", text, re.DOTALL)
        called = found and re.search(r"<(.*?)>", found[1])
        return (called[1], found[1].partition(">")[2]) if found and called else (None, None)

    def compute_reward(self, histories: Sequence[TextHistory], **reward_kwargs: Any) -> Sequence[TextHistory]:
        """Set `reward` of each history."""
        if self.reward_fn is not None:
            rewards = self.reward_fn([history.last_text_segment for history in histories], **reward_kwargs)
            for history, reward in zip(histories, rewards, strict=True):
                history.reward = reward
        return histories

    def generate(self, histories: Sequence[TextHistory]) -> Sequence[TextHistory]:
        """Append a reply of the model to each history."""
        batch = self.tokenizer.pad(
            {"input_ids": [history.tokens.tolist() for history in histories]}, return_tensors="pt", padding_side="left"
        ).to(self._device())
        stops = {"stop_strings": [self.call_token, self.submit_token], "tokenizer": self.tokenizer}
        with torch.no_grad():
            output = self.model.generate(**batch, **(stops | self.generation_kwargs))
        for history, row in zip(histories, output[:, batch["input_ids"].shape[1] :], strict=True):
            tokens = self._without_padding(row)
            history.append_segment(decode_tokens(self.tokenizer, tokens.tolist()), tokens, system=False)
        return histories

    def _without_padding(self, row: Tensor) -> Tensor:
        """A row up to its end-of-sequence token, or to the string that stopped it."""
        is_padding = row == self.tokenizer.pad_token_id
        length = len(row) - int(is_padding.flip(0).long().cumprod(0).sum())
        text = decode_tokens(self.tokenizer, row[:length].tolist())
        is_stopped = self.call_token in text or self.submit_token in text
        if length < len(row) and not is_stopped and self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            length += 1  # the first is sampled, the others are padding
        return row[: max(length, 1)]

    def _complete_if_ended(self, history: TextHistory, *, model_turn: bool) -> bool:
        last = history.last_text_segment
        truncated = self.max_length is not None and len(history.tokens) > self.max_length
        calls = self.request_token in last and self.call_token in last
        ended = self.tokenizer.eos_token in history.text or self.submit_token in last or (model_turn and not calls)
        if truncated or ended:
            history.complete(truncated=truncated)
        return history.completed

    def _encode(self, text: str, *, add_special_tokens: bool) -> Tensor:
        bare: dict[str, Any] = {"add_special_tokens": False}
        ids = (
            encode_texts(self.tokenizer, [text])[0] if add_special_tokens else self.tokenizer(text, **bare)["input_ids"]
        )
        return torch.tensor(ids, device=self._device())

    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device
