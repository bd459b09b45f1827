"""The doctor: does the trainer score what the sampler drew? One look at the first batch, each finding with its remedy.

`trainer.diagnose(batch)` looks whenever you ask; by default the trainer looks once by itself, at its first step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.diagnostics.findings import Diagnosis, Finding, finding
from rlhf_ppo.rewards.sources import RewardScores, RewardSources, named_sources
from rlhf_ppo.rollout.collect import CollectedResponses
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.samplers.base import Samples, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class DiagnosedBatch:
    """A batch to look at. The more is known of it, the more can be checked."""

    prompts: Sequence[Tensor]
    """One Long [P_i] a response."""
    responses: Sequence[Tensor]
    """One Long [T_i] each, as they go into the loss."""
    masks: Sequence[Tensor] | None = None
    """One Bool [T_i] each: False at tokens that others wrote. None: all are the policy's."""
    logprobs: Sequence[Tensor] | None = None
    """log-probabilities that the sampler reports, one [T_i] each."""
    sampling: SamplingConfig | None = None
    """How they were drawn."""
    prompt_texts: Sequence[str] | None = None
    """Prompts as the reward sources read them."""
    response_texts: Sequence[str] | None = None
    """Responses as the reward sources read them."""
    scores: Tensor | None = None
    """[B] or [B, T]."""
    sources: RewardSources | None = None
    """Who scored."""

    @classmethod
    def of(cls, batch: "DiagnosedBatch | Samples") -> "DiagnosedBatch":
        """`batch` as a specimen."""
        if isinstance(batch, DiagnosedBatch):
            return batch
        return cls(prompts=batch.prompts, responses=batch.responses, logprobs=batch.logprobs)

    @classmethod
    def of_rollout(
        cls, collected: CollectedResponses, scores: RewardScores, sampling: SamplingConfig, sources: RewardSources
    ) -> "DiagnosedBatch":
        """What `train()` knows of a rollout."""
        samples = collected.samples
        return cls(
            prompts=samples.prompts, responses=samples.responses, logprobs=samples.logprobs, sampling=sampling,
            prompt_texts=collected.prompts, response_texts=collected.responses, scores=scores.total[~scores.skipped],
            sources=sources,
        )  # fmt: skip

    @classmethod
    def of_batch(cls, batch: Responses) -> "DiagnosedBatch":
        """What `step()` knows of its batch."""
        inputs = batch.inputs
        masks = [row[: len(tokens)].cpu() for row, tokens in zip(batch.mask, inputs.responses, strict=True)]
        return cls(prompts=inputs.prompts, responses=inputs.responses, masks=masks, scores=batch.scores)


@runtime_checkable
class SupportsTextChecks(Protocol):
    """A reward source that can tell whether texts look like those it was trained on."""

    def check_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[tuple[str, str, str]]:
        """What is wrong with these texts, each as (found, cause, remedy)."""
        ...


Check: TypeAlias = Callable[[DiagnosedBatch, PreTrainedTokenizerBase], list[Finding] | None]
"""Findings; None where the specimen does not say enough for the check."""


def eos_in_prompt(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """End-of-sequence tokens behind the first token of a prompt. At its start, one may be the BOS of GPT-2's kind."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return None
    rows = [row for row, prompt in enumerate(batch.prompts) if bool((prompt[1:] == eos).any())]
    ending = [row for row in rows if int(batch.prompts[row][-1]) == eos]
    if not rows:
        return []
    where = f"{len(rows)} of {len(batch.prompts)} prompts hold the end-of-sequence token {eos}, e.g. prompt {rows[0]}"
    said = f"{where}; {len(ending)} end in it" if ending else where
    return [finding("eos_in_prompt", said, severity="warning" if ending else "note")]


def pad_is_eos(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Padding that cannot be told from the end; a warning where it has been left in the responses."""
    eos = tokenizer.eos_token_id
    if eos is None or tokenizer.pad_token_id != eos:
        return []
    padded = [row for row, tokens in enumerate(batch.responses) if len(tokens) > 1 and bool((tokens[-2:] == eos).all())]
    if padded:
        said = f"{len(padded)} of {len(batch.responses)} responses end in several {eos}, e.g. {padded[0]}"
        return [finding("pad_is_eos", said)]
    return [
        finding(
            "pad_is_eos", f"pad_token_id and eos_token_id are both {eos}", severity="note",
            cause="the tokenizer had no padding token. Nothing here depends on it, but code that finds the end by "
            "padding, or masks padding in a loss, loses the stop token",
            remedy="add a padding token of its own if such code is used",
        )
    ]  # fmt: skip


def retokenization(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Tokens that do not survive decoding and encoding; texts that are not those of the tokens."""
    special = set(tokenizer.all_special_ids)
    rows = [[token for token in response.tolist() if token not in special] for response in batch.responses]
    texts = [str(tokenizer.decode(row)) for row in rows]
    findings: list[Finding] = []
    if batch.response_texts is not None:
        other = [row for row, text in enumerate(texts) if text.strip() != batch.response_texts[row].strip()]
        if other:
            shown = f"{batch.response_texts[other[0]][:40]!r} for {texts[other[0]][:40]!r}"
            said = (
                f"{len(other)} of {len(texts)} texts are not those of the trained tokens, e.g. row {other[0]}: {shown}"
            )
            findings.append(finding("other_text", said))
    drifting = [
        row for row, text in enumerate(texts) if tokenizer(text, add_special_tokens=False)["input_ids"] != rows[row]
    ]
    if drifting:
        said = f"{len(drifting)} of {len(texts)} responses become other tokens when their text is encoded again"
        findings.append(finding("retokenization", said, severity="note"))
    return findings


def reward_template(batch: DiagnosedBatch, _: PreTrainedTokenizerBase) -> list[Finding] | None:
    """What reward sources that can say so find wrong with the texts they are given."""
    if batch.sources is None or batch.prompt_texts is None or batch.response_texts is None:
        return None
    findings: list[Finding] = []
    for item in named_sources(batch.sources):
        if isinstance(item.source, SupportsTextChecks):
            for found, cause, remedy in item.source.check_texts(batch.prompt_texts, batch.response_texts):
                said = f"reward source {item.name!r}: {found}"
                findings.append(finding("reward_template", said, cause=cause, remedy=remedy))
    return findings


def spread(batch: DiagnosedBatch, _: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Scores that are all alike, or responses that are."""
    findings: list[Finding] = []
    if batch.scores is not None and len(batch.scores) >= 4:
        totals = batch.scores if batch.scores.dim() == 1 else batch.scores.sum(dim=1)
        if float(totals.max()) == float(totals.min()):
            said = f"all {len(totals)} scores are {float(totals[0]):g}"
            findings.append(finding("equal_scores", said, severity="note"))
    texts = {tuple(response.tolist()) for response in batch.responses}
    prompts = {tuple(prompt.tolist()) for prompt in batch.prompts}
    if len(texts) == 1 and len(prompts) >= 4:
        said = f"{len(prompts)} prompts got one and the same response"
        findings.append(finding("equal_responses", said, severity="note"))
    return findings


TEXT_CHECKS: dict[str, Check] = {
    "eos_in_prompt": eos_in_prompt, "pad_is_eos": pad_is_eos, "retokenization": retokenization,
    "reward_template": reward_template, "spread": spread,
}  # fmt: skip


def run_text_checks(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> Diagnosis:
    """Every check that needs no model."""
    results = {name: check(batch, tokenizer) for name, check in TEXT_CHECKS.items()}
    made = {name: found for name, found in results.items() if found is not None}
    return Diagnosis(findings=[finding for found in made.values() for finding in found], checked=list(made))


def select_rows(batch: DiagnosedBatch, *, rows: int, tokens: int) -> DiagnosedBatch:
    """The first rows, as many as hold at most so many response tokens together, and one at least."""
    kept, total = 0, 0
    for response in batch.responses[:rows]:
        total += len(response)
        if kept and total > tokens:
            break
        kept += 1

    def head(values: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        return None if values is None else values[:kept]

    return DiagnosedBatch(
        prompts=batch.prompts[:kept], responses=batch.responses[:kept], masks=head(batch.masks),
        logprobs=head(batch.logprobs), sampling=batch.sampling,
    )  # fmt: skip


def select_actions(batch: DiagnosedBatch, values: Sequence[Tensor]) -> Tensor:
    """One entry for each action of the policy, 1-D, from one row of entries for each response."""
    if batch.masks is None:
        return torch.cat(list(values))
    return torch.cat([row[mask.to(row.device)] for row, mask in zip(values, batch.masks, strict=True)])
