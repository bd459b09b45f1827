"""Every text-generating architecture of the installed transformers as a tiny policy: score, generate, learn, save.

`python -m tests.models.zoo` writes the table of docs/models.md; with names of architectures it prints their rows.
"""

import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto as auto

from rlhf_ppo import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    PreTrainedModelWrapper,
)
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.trunk import call_model, decoder_start_token
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_architectures import config_of
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_tokenizer

CLOSE = 1e-4
"""How far log-probabilities and values may differ from the model's own, in nats."""
NEW_TOKENS, MAX_PARAMETERS = 6, 3_000_000


@dataclass(frozen=True)
class Verdict:
    """What became of one architecture."""

    name: str
    status: str
    """"exact", "refused", "wrong", "error", or "not built"."""
    note: str = ""
    in_force: tuple[str, ...] = ()
    """Fast paths in force."""

    @property
    def is_right(self) -> bool:
        """Whether it is neither wrong nor a traceback."""
        return self.status in ("exact", "refused", "not built")


class NotBuiltError(Exception):
    """Config or libraries do not allow a tiny model."""


class RefusedError(Exception):
    """The trainer refuses the model in a sentence."""


KINDS: dict[str, Any] = {
    "": (AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq/": (AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "vision/": (AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
"""Prefix of a name -> its auto class, and the architectures that it knows. All of them are given text alone."""


def architectures() -> list[str]:
    """All of them; those that read images only where they are not among the others."""
    others = {*KINDS[""][1], *KINDS["seq2seq/"][1], "shieldgemma2"}  # which classifies images
    names = [(kind, name) for kind, (_, known) in KINDS.items() for name in known]
    return [kind + name for kind, name in names if kind != "vision/" or name not in others]


def build(name: str) -> Any:
    """A tiny random model in eval mode."""
    kind, slash, plain = name.rpartition("/")
    auto_class, _ = KINDS[kind + slash]
    try:
        config = config_of(plain)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in auto_class.from_config(config).parameters())
        if size > MAX_PARAMETERS:
            raise ValueError(f"{size:,} parameters")
        torch.manual_seed(0)
        model = auto_class.from_config(config).eval()
    except Exception as error:
        raise NotBuiltError(first_line(error)) from error
    disable_dropout(model)
    return model


PROMPTS = [torch.arange(5, 11), torch.arange(20, 23), torch.arange(40, 49)]
RESPONSES = [torch.arange(30, 47), torch.arange(60, 64), torch.arange(70, 76)]


def examine(name: str) -> Verdict:
    """Build one architecture and try all that a policy needs."""
    try:
        return _Examination(name, build(name)).run()
    except NotBuiltError as error:
        return Verdict(name, "not built", str(error))
    except RefusedError as error:
        return Verdict(name, "refused", str(error))
    except AssertionError as error:
        return Verdict(name, "wrong", str(error))
    except Exception as error:
        return Verdict(name, "error", first_line(error))


class _Examination:
    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model

    def run(self) -> Verdict:
        try:
            expected = [own_scores(self.model, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
            greedy = [own_greedy(self.model, prompt) for prompt in PROMPTS]
        except Exception as error:
            self.trainer(self.model)
            raise AssertionError(f"accepted, though its own call fails: {first_line(error)}") from error
        trainer = self.trainer(self.model)
        self.check_scores(trainer, [logprobs for logprobs, _ in expected], [states for _, states in expected])
        self.check_generation(trainer, greedy)
        self.check_step(trainer)
        self.check_saving(trainer)
        self.check_lora()
        paths: Any = trainer.policy.paths
        in_force = [name for name in ("head_rows", "packing", "last_layer", "fused_head") if getattr(paths, name)]
        if DecodeLoop().unsupported_reason(self.model) is None:  # by its structure, and by a trial
            in_force.append("decode_loop")
        declined = sorted(paths.declined)
        note = "" if paths.head_rows else f"plain path ({', '.join(declined) or 'encoder-decoder'})"
        return Verdict(self.name, "exact", note, tuple(in_force))

    def trainer(self, model: Any, **arguments: Any) -> PPOTrainer:
        kind: type[PreTrainedModelWrapper] = AutoModelForCausalLMWithValueHead
        if model.config.is_encoder_decoder:
            kind = AutoModelForSeq2SeqLMWithValueHead
        config = PPOConfig(batch_size=3, mini_batch_size=3, ppo_epochs=1, learning_rate=1e-3, diagnose=False)
        try:
            return PPOTrainer(config, kind.from_pretrained(model, **arguments), None, tiny_tokenizer())
        except (ValueError, TypeError) as error:
            if str(error).startswith(("expected", "The model", "Only", "Target")):
                raise RefusedError(first_line(error)) from error
            raise

    def check_scores(self, trainer: PPOTrainer, logprobs: list[Tensor], states: list[Tensor]) -> None:
        with torch.no_grad():
            output = trainer.policy(TokenInputs(prompts=PROMPTS, responses=RESPONSES))
            values = [trainer.model.v_head(row).squeeze(-1) for row in states]
        for row, (own, value) in enumerate(zip(logprobs, values, strict=True)):
            gap = float((output.logprobs[row, : len(own)] - own).abs().max())
            assert gap <= CLOSE, f"log-probabilities differ by {gap:.1e}"
            gap = float((output.values[row, : len(value)] - value).abs().max())
            assert gap <= 10 * CLOSE, f"values differ by {gap:.1e}"

    def check_generation(self, trainer: PPOTrainer, greedy: list[Tensor]) -> None:
        settings: Any = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": EOS_TOKEN_ID, "num_beams": 1}
        settings |= {"pad_token_id": 0, "forced_eos_token_id": None, "no_repeat_ngram_size": 0}
        for name in ("forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
            setattr(self.model.generation_config, name, None)
        try:
            found = trainer.generate(PROMPTS, return_prompt=False, **settings)
        except ValueError as error:
            if str(error).startswith("expected"):
                raise RefusedError(f"generation: {first_line(error)}") from error
            raise
        for row, own in zip(found, greedy, strict=True):
            row = row[1:] if self.model.config.is_encoder_decoder else row
            assert row.tolist() == own.tolist(), f"greedy tokens {row.tolist()} for {own.tolist()}"

    def check_step(self, trainer: PPOTrainer) -> None:
        expected = learning_parameters(self.model)
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        statistics = trainer.step(PROMPTS, RESPONSES, [torch.tensor(score) for score in (1.0, -1.0, 0.5)])
        assert abs(float(statistics["objective/kl"])) < CLOSE, f"KL {float(statistics['objective/kl']):.1e} at start"
        named = trainer.model.pretrained_model.named_parameters()
        moved = {name for name, weight in named if not torch.equal(weight, before[f"pretrained_model.{name}"])}
        assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters()), "weights are not finite"
        assert moved >= expected, f"{len(expected - moved)} of {len(expected)} tensors did not move"

    def check_saving(self, trainer: PPOTrainer) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_pretrained(folder)
            loaded = type(trainer.model).from_pretrained(folder).eval()
        own, _ = own_scores(trainer.model.pretrained_model.eval(), PROMPTS[0], RESPONSES[0])
        again, _ = own_scores(loaded.pretrained_model.eval(), PROMPTS[0], RESPONSES[0])
        gap = float((own - again).abs().max())
        assert gap <= CLOSE, f"a saved policy loads with log-probabilities that differ by {gap:.1e}"
        for name, weight in trainer.model.v_head.state_dict().items():
            assert torch.equal(weight, loaded.v_head.state_dict()[name]), "the value head was not saved"

    def check_lora(self) -> None:
        model = build(self.name)
        base = own_scores(model, PROMPTS[0], RESPONSES[0])[0]
        settings: Any = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
        try:
            trainer = self.trainer(model, peft_config=LoraConfig(**settings))
        except (ValueError, RefusedError) as error:  # layers of Mamba's kernels; routers, whose result is a tuple
            if "Mamba" not in str(error) and "tuple" not in str(error):
                raise
            settings["exclude_modules"] = r".*(out_proj|conv1d|conv|router|gate)(\..*)?$"
            trainer = self.trainer(build(self.name), peft_config=LoraConfig(**settings))
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        trainer.step(PROMPTS, RESPONSES, [torch.tensor(score) for score in (1.0, -1.0, 0.5)])
        moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
        assert moved and all("lora" in name or "v_head" in name for name in moved), "an update moved the base"
        assert any("lora" in name for name in moved), "an update moved no adapter"
        with trainer.reference_context(), torch.no_grad():
            reference = own_scores(trainer.model.pretrained_model.get_base_model(), PROMPTS[0], RESPONSES[0])[0]
        gap = float((reference - base).abs().max())
        assert gap <= CLOSE, f"the reference is not the base: {gap:.1e}"


@torch.no_grad()
def own_scores(model: Any, prompt: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a response and hidden states for its values, by the model's own call on this row alone."""
    if model.config.is_encoder_decoder:
        start = torch.tensor([decoder_start_token(model)])
        output = call_model(model, input_ids=prompt[None], decoder_input_ids=torch.cat([start, response])[None])
        logits, states = output.logits[0, :-1], output.decoder_hidden_states[-1][0]
    else:
        output = call_model(model, input_ids=torch.cat([prompt, response])[None])
        logits, states = output.logits[0, len(prompt) - 1 : -1], output.hidden_states[-1][0, len(prompt) - 1 :]
    return logits.float().log_softmax(dim=-1).gather(1, response[:, None]).squeeze(1), states


def learning_parameters(model: Any) -> set[str]:
    """Names of the parameters that log-probabilities depend on, by the model's own call and autograd."""
    loss = torch.zeros(())
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        loss = loss + own_scores.__wrapped__(model, prompt, response)[0].sum()  # type: ignore[attr-defined]
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named, found, strict=True)
    return {name for name, gradient in pairs if gradient is not None and float(gradient.abs().max()) > CLOSE}


@torch.no_grad()
def own_greedy(model: Any, prompt: Tensor) -> Tensor:
    """The likeliest token each time, by the model's own call without a cache, up to the end-of-sequence token."""
    response = prompt[:0]
    for _ in range(NEW_TOKENS):
        given = {"input_ids": prompt[None]}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = torch.cat([torch.tensor([decoder_start_token(model)]), response])[None]
        else:
            given["input_ids"] = torch.cat([prompt, response])[None]
        response = torch.cat([response, call_model(model, **given).logits[0, -1:].argmax(dim=-1)])
        if int(response[-1]) == EOS_TOKEN_ID:
            break
    return response


def first_line(error: BaseException) -> str:
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- zoo: begin -->\n", "<!-- zoo: end -->\n"
HEADER = ["| architecture | verdict | fast paths in force |", "|---|---|---|"]


def row(verdict: Verdict) -> str:
    """The table's row of a verdict; a refusal's first sentence only."""
    note = re.sub(r" by [\d.e+-]+ of the largest", "", verdict.note)  # which differs from one processor to the next
    note = " ".join(note.split(". ")[0].split("; ")[0].replace("|", "/").split())
    text = f"{verdict.status}: {note}" if verdict.status != "exact" else ", ".join(filter(None, ("exact", note)))
    return f"| {verdict.name} | {text} | {', '.join(verdict.in_force) or 'none'} |"


def table_of_page() -> list[str]:
    """The rows of the table in docs/models.md."""
    text = PAGE.read_text().split(START)[1].split(END)[0]
    return text.strip().splitlines()[len(HEADER) :]


def main(names: list[str]) -> None:
    """Print the rows of `names`; without names, write the whole table."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
    rows = []
    for name in names or architectures():
        rows.append(row(examine(name)))
        print(rows[-1], flush=True)
    if not names:
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(before + START + "\n".join([*HEADER, *rows]) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main(sys.argv[1:])
