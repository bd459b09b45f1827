"""`TextEnvironment` of TRL's classic: tools called in text, episodes as `step()` takes them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.environments.text_environment import TextEnvironment, TextHistory
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer


class Script:
    """A model whose replies are those of a list, padded as `generate` pads them."""

    def __init__(self, *turns: list[str]) -> None:
        self.turns, self.settings = list(turns), dict[str, Any]()

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        self.settings = settings
        tokenizer = tiny_tokenizer()
        rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in self.turns.pop(0)]
        assert len(rows) == len(input_ids)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=int(tokenizer.pad_token_id))
        return torch.cat([input_ids, padded], dim=1)


def calculate(text: str) -> str:
    left, right = text.split("*")
    return str(int(left) * int(right))


def exact(answers: list[str], truth: list[str]) -> list[float]:
    return [float(right in answer) for answer, right in zip(answers, truth, strict=True)]


def environment(*turns: list[str], **settings: Any) -> TextEnvironment:
    return TextEnvironment(Script(*turns), tiny_tokenizer(), {"Calc": calculate}, exact, prompt="Q: ", **settings)


def test_an_episode_holds_the_models_tokens_and_the_tools_with_a_mask() -> None:
    """Of two episodes, one calls the tool and submits, the other answers at once."""
    call, answer = "<request><Calc>6*7<call>", "42<submit>"
    played = environment([call, "I guess 41"], [answer]).run(["6*7", "1*2"], truth=["42", "2"])
    queries, responses, masks, rewards, histories = played
    tokenizer = tiny_tokenizer()
    parts = [tokenizer(text)["input_ids"] for text in (call, "42<response>", answer)]
    assert [query.tolist() for query in queries] == [tokenizer(f"Q: {text}")["input_ids"] for text in ("6*7", "1*2")]
    assert responses[0].tolist() == parts[0] + parts[1] + parts[2]
    assert masks[0].tolist() == [1] * len(parts[0]) + [0] * len(parts[1]) + [1] * len(parts[2])
    assert responses[1].tolist() == tokenizer("I guess 41")["input_ids"]
    assert rewards == [1.0, 0.0]
    assert histories[0].text == f"Q: 6*7{call}42<response>{answer}"
    assert histories[0].system_spans == [True, False, True, False]
    assert [history.completed for history in histories] == [True, True]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<request>6*7<call>", "Unknown tool call: <request>6*7<call><response>"),
        ("<request><Search>so<call>", "Unknown tool Search.<response>"),
        ("<request><Calc>so<call>", "Tool error: not enough values"),
        ("<request><Calc>" + "9" * 300 + "*1<call>", "9" * 97 + "...<response>"),
    ],
)
def test_calls_that_fail_are_answered_in_words_of_limited_length(reply: str, answer: str) -> None:
    (history,) = environment([reply], max_turns=1).run(["?"], truth=["?"])[-1]
    assert history.last_text_segment.startswith(answer)
    assert len(history.last_text_segment) <= 100 + len("<response>")
    assert not history.completed


def test_an_episode_over_the_limit_is_truncated_and_plays_no_further_turn() -> None:
    (history,) = environment(["<request><Calc>6*7<call>"], max_length=30).run(["?"], truth=["?"])[-1]
    assert (history.completed, history.truncated) == (True, True)


def test_tools_in_a_list_are_called_by_their_class() -> None:
    class Calc:
        def __call__(self, text: str) -> str:
            return calculate(text)

    assert TextEnvironment(Script(), tiny_tokenizer(), [Calc()]).tools["Calc"]("2*3") == "6"


def test_an_empty_segment_is_refused() -> None:
    history = TextHistory("a", torch.tensor([5]))
    with pytest.raises(ValueError, match="empty text or token list"):
        history.append_segment("", torch.tensor([]))


def test_a_model_plays_and_the_trainer_learns_from_the_episodes() -> None:
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    config = PPOConfig(batch_size=2, mini_batch_size=1, ppo_epochs=1)
    trainer = PPOTrainer(config, model, None, tokenizer)
    game = TextEnvironment(
        model, tokenizer, {"Calc": calculate}, lambda texts: [torch.tensor(float(len(text))) for text in texts],
        max_turns=2, generation_kwargs={"max_new_tokens": 4, "do_sample": True, "pad_token_id": tokenizer.pad_token_id},
    )  # fmt: skip
    queries, responses, masks, rewards, _ = game.run(["The movie", "A"])
    statistics = trainer.step(queries, responses, rewards, masks)
    assert statistics["ppo/mean_scores"] == pytest.approx(sum(map(float, rewards)) / 2)


def test_half_a_character_from_a_tool_is_read_as_a_replacement_character() -> None:
    playing = environment(["<request><half>x<call>"], max_turns=1)
    playing.tools["half"] = lambda _: "a \ud83d"
    (history,) = playing.run(["?"], truth=["?"])[-1]
    assert history.last_text_segment == "a \ufffd<response>"
