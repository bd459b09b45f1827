"""The doctor's cause is the true one: each planted fault is the only warning, whatever follows from it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reward_model.models.contract import Contract
from reward_model.models.model import RewardModel
from rlhf_ppo import GRPO, AutoModelForCausalLMWithValueHead, PPOTrainer, TrainConfig
from rlhf_ppo.diagnostics.findings import KNOWN_FINDINGS
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch
from rlhf_ppo.environments import Turn
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.classic.test_classic import trainer_of
from tests.diagnostics.test_environment_checks import Deaf, Hopeless
from tests.support.games import CountE
from tests.support.tiny_models import EOS_TOKEN_ID, PAD_TOKEN_ID, tiny_gpt2, tiny_tokenizer
from tests.support.tiny_run import config
from tests.support.tiny_run import trainer as tiny_run_trainer

PLAIN = SamplingConfig(max_new_tokens=32)
TOKENIZER = tiny_tokenizer()
PROMPTS = [torch.tensor(TOKENIZER(text)["input_ids"]) for text in ("The movie", "I", "This film was", "We went to") * 2]


@pytest.fixture(scope="module")
def trainer() -> PPOTrainer:
    return trainer_of(batch_size=8, mini_batch_size=4)


@pytest.fixture(scope="module")
def honest(trainer: PPOTrainer) -> DiagnosedBatch:
    return draw(trainer.model)


def draw(model: Any, prompts: Sequence[Tensor] = PROMPTS, **settings: Any) -> DiagnosedBatch:
    """Responses with all that a sampler knows: its settings and its log-probabilities."""
    sampling = replace(PLAIN, **settings)
    samples = DecodeLoop(TOKENIZER)(model, prompts, sampling, generator=torch.Generator().manual_seed(3))
    return replace(DiagnosedBatch.of(samples), sampling=sampling)


def without_word(batch: DiagnosedBatch) -> DiagnosedBatch:
    """The tokens alone, as `step` gets them."""
    return replace(batch, sampling=None, logprobs=None)


def warned(trainer: PPOTrainer, batch: DiagnosedBatch) -> set[str]:
    return {finding.name for finding in trainer.diagnose(batch).warnings}


def other_policy() -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=1))


def test_nothing_is_blamed_where_no_fault_is_planted(trainer: PPOTrainer, honest: DiagnosedBatch) -> None:
    assert warned(trainer, honest) == set()
    assert warned(trainer, without_word(honest)) == set()


@pytest.mark.parametrize(
    ("settings", "from_tokens"),
    [
        pytest.param({"temperature": 0.6}, "temperature", marks=pytest.mark.slow),
        ({"temperature": 0.1}, "temperature"),
        ({"temperature": 2.5}, "unlikely_tokens"),
        pytest.param({"top_k": 8}, "truncated", marks=pytest.mark.slow),
        pytest.param({"top_p": 0.6}, "truncated", marks=pytest.mark.slow),
        ({"do_sample": False}, "truncated"),
        ({"repetition_penalty": 1.3}, None),
        ({"min_new_tokens": 32}, None),
    ],
    ids=str,
)
def test_settings_of_the_sampler_are_blamed_as_far_as_they_are_known(
    trainer: PPOTrainer, settings: dict[str, Any], from_tokens: str | None
) -> None:
    """With the settings at hand they are named; from its log-probabilities the sampler; from tokens what they show."""
    batch = draw(trainer.model, **settings)
    assert warned(trainer, batch) == {"sampling"}
    assert warned(trainer, without_word(batch)) == ({from_tokens} if from_tokens else set())
    if settings.get("do_sample", True) and "min_new_tokens" not in settings:
        assert warned(trainer, replace(batch, sampling=None)) == {"sampler"}


def test_stale_weights_in_the_sampler_are_not_taken_for_a_temperature(trainer: PPOTrainer) -> None:
    batch = draw(other_policy())
    assert warned(trainer, batch) == {"sampler"}
    assert warned(trainer, without_word(batch)) == {"unlikely_tokens"}


@pytest.mark.parametrize("scale", [1.0, 1.02, 1.5])
def test_an_engine_that_took_a_part_of_the_weights_is_warned_of_although_the_update_corrects_for_engines(
    scale: float,
) -> None:
    """Its LM head is of another moment, as that of vLLM on a CPU where it is tied; kernels alone are a note at most."""
    corrected = trainer_of(importance_sampling="truncate")
    engine = trainer_of().model
    with torch.no_grad():
        engine.pretrained_model.transformer.ln_f.weight.mul_(scale)  # as if the head had been
    batch = draw(engine)
    assert warned(corrected, batch) == ({"sampler"} if scale == 1.5 else set())


def test_a_sharper_sampler_is_taken_neither_for_a_temperature_nor_for_truncation(trainer: PPOTrainer) -> None:
    """The sampler holds the same weights with a head four times as large."""
    sharper = trainer_of().model
    sharper.pretrained_model.transformer.ln_f.weight.data *= 4
    sharper.pretrained_model.transformer.ln_f.bias.data *= 4
    assert warned(trainer, draw(sharper)) == {"sampler"}


def encoded_again(batch: DiagnosedBatch) -> DiagnosedBatch:
    texts = [str(TOKENIZER.decode(row.tolist())) for row in batch.responses]
    tokens = [torch.tensor(TOKENIZER(text)["input_ids"]) for text in texts]
    return replace(without_word(batch), responses=tokens)


def padded(batch: DiagnosedBatch, token: int) -> DiagnosedBatch:
    tail = torch.tensor([EOS_TOKEN_ID] + [token] * 8)
    assert batch.logprobs is not None
    return replace(
        batch,
        responses=[torch.cat([row[:8], tail]) for row in batch.responses],
        logprobs=[torch.cat([row[:8], torch.zeros(len(tail))]) for row in batch.logprobs],
    )


def cut_texts(batch: DiagnosedBatch) -> DiagnosedBatch:
    texts = [str(TOKENIZER.decode(row.tolist(), skip_special_tokens=True)) for row in batch.responses]
    return replace(batch, response_texts=[text[: len(text) // 2] for text in texts])


def scores_at_observations(batch: DiagnosedBatch) -> DiagnosedBatch:
    masks = [torch.arange(len(row)) < len(row) - 2 for row in batch.responses]
    scores = torch.zeros(len(masks), max(map(len, masks)))
    for row, mask in enumerate(masks):
        scores[row, len(mask) - 1] = float(row)
    return replace(batch, masks=masks, scores=scores)


def chat_for_plain_reward(batch: DiagnosedBatch) -> DiagnosedBatch:
    judge = RewardModel(tiny_gpt2(), tiny_tokenizer(chat=True), Contract())
    texts = [str(TOKENIZER.decode(row.tolist(), skip_special_tokens=True)) for row in batch.responses]
    prompts = ["user: How was it?\nassistant: "] * len(texts)
    return replace(batch, prompt_texts=prompts, response_texts=texts, sources={"judge": judge})


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (encoded_again, "unlikely_tokens"),
        (lambda batch: replace(without_word(batch), prompts=batch.responses[::-1]), "unlikely_tokens"),
        (lambda batch: replace(batch, logprobs=[row + 0.3 for row in batch.logprobs]), "sampler"),
        (partial(padded, token=PAD_TOKEN_ID), "padded_responses"),
        (lambda batch: without_word(padded(batch, PAD_TOKEN_ID)), "padded_responses"),
        (cut_texts, "other_text"),
        (scores_at_observations, "masked_scores"),
        (chat_for_plain_reward, "reward_template"),
    ],
    ids=[
        "encoded-again", "other-prompts", "other-log-probabilities", "padding-left-in", "padding-left-in-untold",
        "text-cut", "scores-at-observations", "chat-for-plain-reward",
    ],
)  # fmt: skip
def test_a_fault_of_the_batch_is_the_only_warning(
    trainer: PPOTrainer, honest: DiagnosedBatch, fault: Callable[[DiagnosedBatch], DiagnosedBatch], name: str
) -> None:
    assert warned(trainer, fault(honest)) == {name}


def test_prompts_that_end_in_the_stop_token_are_the_only_warning(trainer: PPOTrainer) -> None:
    prompts = [torch.cat([row, torch.tensor([EOS_TOKEN_ID])]) for row in PROMPTS]
    assert warned(trainer, draw(trainer.model, prompts)) == {"eos_in_prompt"}


def test_rows_of_a_padded_batch_are_the_only_warning(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the padding is the stop token, of which one alone may begin a prompt."""
    for side in ("left", "right"):
        rows = torch.nn.utils.rnn.pad_sequence(PROMPTS, batch_first=True, padding_side=side)
        assert warned(trainer, draw(trainer.model, list(rows))) == {"padded_prompts"}
    same = tiny_tokenizer()
    same.pad_token = same.eos_token
    monkeypatch.setattr(trainer, "tokenizer", same)
    for count, found in ((1, set()), (2, {"padded_prompts"})):
        prompts = [torch.cat([torch.full((count,), EOS_TOKEN_ID), row]) for row in PROMPTS]
        assert warned(trainer, draw(trainer.model, prompts)) == found


def test_padding_by_the_stop_token_left_in_responses_is_the_only_warning(
    trainer: PPOTrainer, honest: DiagnosedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = tiny_tokenizer()
    same.pad_token = same.eos_token
    monkeypatch.setattr(trainer, "tokenizer", same)
    for batch in (padded(honest, EOS_TOKEN_ID), without_word(padded(honest, EOS_TOKEN_ID))):
        assert warned(trainer, batch) == {"pad_is_eos"}


@contextmanager
def hooked(trainer: PPOTrainer, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    embedding = trainer.model.pretrained_model.transformer.wte
    handle = embedding.register_forward_hook(lambda _, __, output: change(output))
    yield
    handle.remove()


def dropout(trainer: PPOTrainer) -> AbstractContextManager[None]:
    return hooked(trainer, lambda output: torch.nn.functional.dropout(output, 0.3, training=True))


def sees_other_tokens(trainer: PPOTrainer) -> AbstractContextManager[None]:
    return hooked(trainer, lambda output: output + output.mean(1, keepdim=True))


@contextmanager
def capped_logits(trainer: PPOTrainer) -> Iterator[None]:
    """Logits that are not the head of the trunk's output, since after the trainer was built."""
    model = trainer.model.pretrained_model

    def cap(_: Any, __: Any, output: Any) -> Any:
        return replace(output, logits=5 * (output.logits / 5).tanh()) if hasattr(output, "logits") else output

    handle = model.register_forward_hook(cap)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("fault", "name"),
    [(dropout, "ratio"), (sees_other_tokens, "padding"), (capped_logits, "scoring")],
    ids=["dropout", "sees-padding", "capped-logits"],
)
@pytest.mark.parametrize("is_told", [True, False])
def test_a_fault_of_the_model_is_the_only_warning_whatever_it_brings_about(
    trainer: PPOTrainer,
    honest: DiagnosedBatch,
    fault: Callable[[PPOTrainer], AbstractContextManager[None]],
    name: str,
    is_told: bool,
) -> None:
    with fault(trainer):
        assert warned(trainer, honest if is_told else without_word(honest)) == {name}


def test_another_reference_is_the_only_warning_and_dropout_is_not_taken_for_one() -> None:
    own = trainer_of(arguments={"ref_model": other_policy()}, batch_size=8, mini_batch_size=4)
    batch = draw(own.model)
    assert warned(own, batch) == {"reference"}
    with dropout(own):
        assert warned(own, batch) == {"ratio"}


class PaysAlways(CountE):
    """The same turn and the same positive reward, whatever is said."""

    def step(self, reply: str) -> Turn:
        return replace(super().step(reply), reward=1.0)


class ReadsTheTool(CountE):
    """The last turn is paid by what the tool said, the first by the reply."""

    def step(self, reply: str) -> Turn:
        turn = super().step(reply)
        return replace(turn, reward=1.0) if turn.terminated else turn


def reads_all(prompts: Sequence[str], responses: Sequence[str], transcripts: Sequence[str]) -> list[float]:
    return [float(" and" in text) for text in transcripts]


@dataclass
class Played:
    """A first rollout with an environment."""

    environment: Any
    rewards: Any = None
    group_size: int = 1

    def warned(self) -> set[str]:
        groups: dict[str, Any] = {"algorithm": GRPO(), "batch_size": 16} if self.group_size > 1 else {}
        own = tiny_run_trainer(diagnose=True, **groups)
        sampling = SamplingConfig(max_new_tokens=4, num_return_sequences=self.group_size)
        settings = TrainConfig(iterations=1, sampling=sampling, progress=False)
        own.train(self.rewards, settings if self.group_size > 1 else config(iterations=1), environment=self.environment)
        assert own.diagnosis is not None
        return {finding.name for finding in own.diagnosis.warnings}


@pytest.mark.parametrize(
    ("played", "name"),
    [
        (Played(Deaf), "dead_environment"),
        pytest.param(Played(Deaf, group_size=2), "dead_environment", marks=pytest.mark.slow),
        (Played(Hopeless, group_size=2), "groups_without_variance"),
        (Played(ReadsTheTool), "reward_survives_empty_reply"),
        pytest.param(Played(PaysAlways, group_size=2), "reward_survives_empty_reply", marks=pytest.mark.slow),
        (Played(CountE, reads_all), "source_reads_observations"),
        (Played(CountE), None),
    ],
    ids=["deaf", "deaf-groups", "hopeless", "reads-the-tool", "pays-always", "source-reads-all", "sound"],
)
def test_a_fault_of_the_environment_is_the_only_warning(played: Played, name: str | None) -> None:
    assert played.warned() == ({name} if name else set())


def test_every_finding_that_can_be_a_warning_has_its_planted_fault_here() -> None:
    notes = {"retokenization", "equal_scores", "equal_responses"}
    text = Path(__file__).read_text()
    assert not [name for name in KNOWN_FINDINGS.keys() - notes if f'"{name}"' not in text]
