"""The doctor: each finding is made where its cause is present, and not where it is absent."""

import math
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from reward_model.models.contract import Contract, TextRule
from reward_model.models.model import RewardModel
from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.diagnostics.findings import KNOWN_FINDINGS, DoctorReport
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch, run_text_checks
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.benchmarks.allocations import peak_bytes
from tests.classic.test_classic import trainer_of, weights
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_tokenizer

PLAIN = SamplingConfig(max_new_tokens=32)
TOKENIZER = tiny_tokenizer()
PROMPTS = [torch.tensor(TOKENIZER(text)["input_ids"]) for text in ("The movie", "I", "This film was", "We went to") * 2]


@pytest.fixture(scope="module")
def trainer() -> PPOTrainer:
    return trainer_of(batch_size=8, mini_batch_size=4, diagnose=True)


def drawn(trainer: PPOTrainer, sampling: SamplingConfig = PLAIN, *, told: bool = False) -> DiagnosedBatch:
    """Responses of the trainer's policy. `told`: with what the sampler knows."""
    samples = DecodeLoop(TOKENIZER)(trainer.model, PROMPTS, sampling, generator=torch.Generator().manual_seed(3))
    return replace(
        DiagnosedBatch.of(samples), logprobs=samples.logprobs if told else None, sampling=sampling if told else None
    )


def test_honest_samples_are_healthy_in_every_check(trainer: PPOTrainer) -> None:
    found = trainer.diagnose(drawn(trainer, told=True))
    assert found.is_healthy, str(found)
    assert {"padding", "ratio", "draws", "sampler", "sampling", "reference", "eos_in_prompt"} <= set(found.checked)
    assert trainer.diagnose(drawn(trainer)).is_healthy, "without the sampler's word, too"


def test_the_temperature_that_the_tokens_fit_is_named(trainer: PPOTrainer) -> None:
    (finding,) = trainer.diagnose(drawn(trainer, replace(PLAIN, temperature=1.8))).warnings
    fitted = float(finding.evidence.split("they fit ")[1].split(" ")[0])
    assert fitted == pytest.approx(1.8, rel=0.25)


def test_sampling_settings_that_bend_the_distribution_are_named(trainer: PPOTrainer) -> None:
    batch = drawn(trainer)
    found = trainer.diagnose(replace(batch, sampling=replace(PLAIN, top_k=50, temperature=0.7)))
    assert "sampling: responses are drawn with top_k=50, temperature=0.7 (the trainer's is 1.0)" in str(found)
    assert "sampling" not in trainer.diagnose(replace(batch, sampling=PLAIN)).names()


def test_a_reference_that_is_not_the_start_is_found_before_learning_and_not_asked_after() -> None:
    other = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=1))
    own = trainer_of(arguments={"ref_model": other}, batch_size=8, mini_batch_size=4)
    batch = drawn(own)
    assert "ref_model=None" in str(own.diagnose(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own.step(PROMPTS, list(batch.responses), [torch.tensor(1.0)] * 8)
    assert "reference" not in own.diagnose(drawn(own)).checked


def test_a_reference_adapter_that_is_not_the_start_is_found_and_adapters_are_named() -> None:
    """The adapter that training starts from has moved since its frozen copy, the reference, was made."""
    adapters = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0), peft_config=adapters)
    own = trainer_of(model, batch_size=8, mini_batch_size=4)
    assert "reference" not in own.diagnose(drawn(own)).names()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    (found,) = [finding for finding in own.diagnose(drawn(own)).findings if finding.name == "reference"]
    assert "adapter" in found.cause


def test_every_finding_has_its_row_on_the_page_of_troubles_and_no_row_is_left_over() -> None:
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    table = page.split("## The doctor found something")[1].split("\n## ")[0]
    named = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    rows = set(re.findall(r"`(\w+)`", " ".join(named)))
    assert rows == {*KNOWN_FINDINGS, "reward_template"}


def specimen(prompts: list[list[int]], responses: list[list[int]], **known: Any) -> DiagnosedBatch:
    return DiagnosedBatch(
        prompts=[torch.tensor(row) for row in prompts], responses=[torch.tensor(row) for row in responses], **known
    )


def test_an_end_of_sequence_token_in_a_prompt_is_found_but_not_at_its_start() -> None:
    ending = run_text_checks(specimen([[5, 6, EOS_TOKEN_ID], [5]], [[7], [8]]), TOKENIZER)
    assert [finding.name for finding in ending.warnings] == ["eos_in_prompt"]
    inside = run_text_checks(specimen([[5, EOS_TOKEN_ID, 6]], [[7]]), TOKENIZER)
    assert inside.is_healthy and "eos_in_prompt" in inside.names()
    assert "eos_in_prompt" not in run_text_checks(specimen([[EOS_TOKEN_ID, 5]], [[7]]), TOKENIZER).names()


def test_padding_that_is_the_stop_token_is_a_note_and_a_warning_where_it_was_left_in() -> None:
    same = tiny_tokenizer()
    same.pad_token = same.eos_token
    left = run_text_checks(specimen([[5]], [[7, EOS_TOKEN_ID, EOS_TOKEN_ID]]), same)
    assert [finding.name for finding in left.warnings] == ["pad_is_eos"]
    clean = run_text_checks(specimen([[5]], [[7, EOS_TOKEN_ID]]), same)
    assert clean.is_healthy and "pad_is_eos" in clean.names()
    assert "pad_is_eos" not in run_text_checks(specimen([[5]], [[7, EOS_TOKEN_ID]]), TOKENIZER).names()


def test_tokens_that_do_not_survive_their_text_are_noted_and_texts_of_other_tokens_are_a_warning() -> None:
    whole = TOKENIZER("The movie was good.")["input_ids"]
    letters = [token for letter in "movie" for token in TOKENIZER(letter)["input_ids"]]
    assert "retokenization" not in run_text_checks(specimen([[5]], [whole]), TOKENIZER).names()
    assert "retokenization" in run_text_checks(specimen([[5]], [letters]), TOKENIZER).names()
    told = run_text_checks(specimen([[5]], [letters], response_texts=["movie"]), TOKENIZER)
    assert "other_text" not in told.names()
    cut = run_text_checks(specimen([[5]], [letters], response_texts=["mov"]), TOKENIZER)
    assert [finding.name for finding in cut.warnings] == ["other_text"]


def test_a_tokenizer_without_an_unknown_token_that_cannot_spell_its_text_is_noted_too() -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<|end|>": 2}))
    words.decoder = decoders.Fuse()  # "ab": no word
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>")
    assert "retokenization" in run_text_checks(specimen([[0]], [[0, 1]]), tokenizer).names()


def test_a_reward_model_says_when_its_texts_are_not_like_those_of_its_training() -> None:
    def judge(template: Any, **settings: Any) -> RewardModel:
        contract = Contract(text=TextRule(template=template, **settings))
        return RewardModel(tiny_gpt2(), tiny_tokenizer(chat=True), contract)

    def look(source: Any, prompt: str) -> DoctorReport:
        known = {"prompt_texts": [prompt], "response_texts": ["good"], "sources": {"judge": source}}
        return run_text_checks(specimen([[5]], [TOKENIZER("good")["input_ids"]], **known), TOKENIZER)

    marked = "user: How was it?\nassistant: "
    assert look(judge("chat"), marked).is_healthy, "its own template has rendered the prompt: it is completed"
    assert "template applied twice" in str(look(judge("chat"), "<|im_start|>user\nHow was it?<|im_end|>\n"))
    assert "trained on plain text" in str(look(judge("plain"), marked))
    assert look(judge("plain"), "The movie was").is_healthy
    assert look(judge("chat"), "How was it?").is_healthy
    assert "longer than the 4 tokens" in str(look(judge("plain", max_length=4), "The movie was boring and"))
    assert look(lambda **_: [1.0], marked).is_healthy, "a function cannot tell"


def test_scores_and_responses_without_any_difference_are_noted() -> None:
    prompts = [[token] for token in (5, 6, 7, 8)]
    same = run_text_checks(specimen(prompts, [[9, 10]] * 4, scores=torch.ones(4)), TOKENIZER)
    assert {"equal_scores", "equal_responses"} <= same.names()
    other = run_text_checks(specimen(prompts, [[9], [10], [11], [12]], scores=torch.arange(4.0)), TOKENIZER)
    assert not {"equal_scores", "equal_responses"} & other.names()


@pytest.mark.filterwarnings("ignore:KL divergence is starting to become negative")  # responses are greedy
def test_the_first_step_is_looked_at_once_and_the_warning_has_cause_and_remedy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = trainer_of(batch_size=8, mini_batch_size=4, diagnose=True, ppo_epochs=1)
    batch = drawn(own, replace(PLAIN, do_sample=False))
    arguments = PROMPTS, list(batch.responses), [torch.tensor(float(row)) for row in range(8)]
    own.step(*arguments)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "rlhf_ppo.diagnostics.doctor"]
    assert re.search(r"The doctor found .* truncated: .* Cause: .* Remedy: generate with do_sample", said)
    assert own.diagnosis is not None and "truncated" in own.diagnosis.names()
    own.step(*arguments)
    assert len([record for record in caplog.records if record.name == "rlhf_ppo.diagnostics.doctor"]) == 1


def test_a_look_changes_no_result() -> None:
    """Weights, random streams and the work that is counted are those of a run without it."""
    found = []
    for diagnose in (True, False):
        own = trainer_of(batch_size=8, mini_batch_size=4, diagnose=diagnose, ppo_epochs=1)
        batch = drawn(own)
        torch.manual_seed(0)
        own.step(PROMPTS, list(batch.responses), [torch.tensor(float(row)) for row in range(8)])
        found.append((weights(own), own.metrics["work/trunk_tokens"], torch.get_rng_state()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])


def test_the_doctor_can_be_sent_away() -> None:
    assert PPOConfig().diagnose
    own = trainer_of(batch_size=8, mini_batch_size=4, diagnose=False, ppo_epochs=1)
    batch = drawn(own, replace(PLAIN, do_sample=False))
    own.step(PROMPTS, list(batch.responses), [torch.tensor(float(row)) for row in range(8)])
    assert own.diagnosis is None
    assert math.isfinite(own.metrics["objective/kl_k3"])


@pytest.mark.slow
def test_the_first_look_needs_no_more_memory_than_the_step_after_it() -> None:
    """It keeps no graph, and of the distributions that it looks at only a few at a time."""
    found = {}
    responses = [torch.arange(16) + 1 for _ in PROMPTS]
    for looks in (True, False):
        settings = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 1, "diagnose": looks}
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(vocab_size=32_000))
        trainer = trainer_of(policy, **settings)
        found[looks] = peak_bytes(partial(trainer.step, PROMPTS, responses, [torch.tensor(1.0)] * 8))
        assert (trainer.diagnosis is not None) == looks
    assert found[True] <= 1.02 * found[False]
