"""The doctor's checks that need no model: on tokens, texts and scores of a batch.

`trainer.diagnose(batch)` runs them on any batch; by default the trainer runs them once, on its first batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.batch import pad_rows
from rlhf_ppo.chat.encoding import decode_tokens
from rlhf_ppo.diagnostics.findings import DoctorReport, Finding, finding
from rlhf_ppo.environments import EnvironmentFactory, Episode
from rlhf_ppo.rewards.sources import RewardScores, RewardSources, named_sources
from rlhf_ppo.rollout.collect import DecodedResponses
from rlhf_ppo.rollout.episodes import episode_rows
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.samplers.base import Samples, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class DiagnosedBatch:
    """A batch for the doctor; a check is skipped if a field that it needs is None."""

    prompts: Sequence[Tensor]
    """Prompt tokens, one Long [P_i] per response, or per segment of an episode."""
    responses: Sequence[Tensor]
    """Response tokens as they enter the loss, one Long [T_i] each."""
    masks: Sequence[Tensor] | None = None
    """One Bool [T_i] each: False at tokens that the policy did not choose. None: it chose all."""
    logprobs: Sequence[Tensor] | None = None
    """Log-probabilities that the sampler reports, nats, one [T_i] each."""
    sampling: SamplingConfig | None = None
    """How the responses were sampled."""
    prompt_texts: Sequence[str] | None = None
    """Prompts as passed to the reward sources."""
    response_texts: Sequence[str] | None = None
    """Responses as passed to the reward sources."""
    scores: Tensor | None = None
    """Scores per response, [B], or per token, [B, T]."""
    token_scores: Tensor | None = None
    """Scores per token of each segment of an episode; None: as `scores`."""
    sources: RewardSources | None = None
    """The reward sources."""
    group_size: int = 1
    """Number of adjacent responses to one prompt."""
    episodes: Sequence[Episode] | None = None
    """The episodes, where an environment answered."""
    tasks: Sequence[Mapping[str, Any]] = ()
    """Arguments of `reset` of each episode."""
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    """Columns as passed to the reward sources."""
    environment: EnvironmentFactory | None = None
    """Makes the environment of an episode."""

    @classmethod
    def of(cls, batch: "DiagnosedBatch | Samples") -> "DiagnosedBatch":
        """Convert samples; a `DiagnosedBatch` is returned unchanged."""
        if isinstance(batch, DiagnosedBatch):
            return batch
        return cls(prompts=batch.prompts, responses=batch.responses, logprobs=batch.logprobs)

    @classmethod
    def of_rollout(
        cls,
        collected: DecodedResponses,
        scores: RewardScores,
        sampling: SamplingConfig,
        sources: RewardSources | None,
        environment: EnvironmentFactory | None = None,
    ) -> "DiagnosedBatch":
        """The batch of a rollout of `train()`."""
        samples, episodes, all_scored = collected.segments(), collected.episodes, not bool(scores.skipped.any())
        rows, per_token = episode_rows(episodes or []), scores.per_token
        return cls(
            prompts=samples.prompts, responses=samples.responses, logprobs=samples.logprobs, sampling=sampling,
            masks=None if episodes is None else [row.mask for row in rows],
            token_scores=pad_rows([per_token[row.episode, row.span] for row in rows])
            if rows and per_token is not None else None,
            prompt_texts=collected.prompts, response_texts=collected.responses, scores=scores.total[~scores.skipped],
            sources=sources, group_size=sampling.num_return_sequences if all_scored else 1, episodes=episodes,
            tasks=collected.tasks, columns=collected.columns, environment=environment,
        )  # fmt: skip

    @classmethod
    def of_batch(cls, batch: Responses) -> "DiagnosedBatch":
        """The batch of a `step()`."""
        inputs = batch.inputs
        masks = [row[: len(tokens)].cpu() for row, tokens in zip(batch.mask, inputs.responses, strict=True)]
        return cls(prompts=inputs.prompts, responses=inputs.responses, masks=masks, scores=batch.scores)


@runtime_checkable
class SupportsTextChecks(Protocol):
    """A reward source that can check whether texts look like those it was trained on."""

    def check_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[tuple[str, str, str]]:
        """Problems of these texts, each as (evidence, cause, remedy)."""


Check: TypeAlias = Callable[[DiagnosedBatch, PreTrainedTokenizerBase], list[Finding] | None]
"""Returns findings; None if the batch lacks a field that the check needs."""


def eos_in_prompt(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Check prompts for end-of-sequence tokens. The first token may be one: models like GPT-2 use it as BOS."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return None
    rows = [row for row, prompt in enumerate(batch.prompts) if bool((prompt[1:] == eos).any())]
    ending = [row for row in rows if int(batch.prompts[row][-1]) == eos]
    if not rows:
        return []
    where = f"{len(rows)} of {len(batch.prompts)} prompts hold the end-of-sequence token {eos}, e.g. prompt {rows[0]}"
    evidence = f"{where}; {len(ending)} end in it" if ending else where
    return [finding("eos_in_prompt", evidence, severity="warning" if ending else "note")]


def padded_prompts(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Check prompts for padding. Where the padding token is EOS or BOS as well, one may begin a prompt."""
    pad = tokenizer.pad_token_id
    if pad is None:
        return None
    allowed = int(pad in (tokenizer.eos_token_id, tokenizer.bos_token_id))
    rows = [
        row
        for row, prompt in enumerate(batch.prompts)
        if (len(prompt) > allowed and bool((prompt[: allowed + 1] == pad).all()))
        or (pad != tokenizer.eos_token_id and bool((prompt[-1:] == pad).any()))
    ]
    evidence = f"{len(rows)} of {len(batch.prompts)} prompts begin or end with the padding token {pad}, e.g. {rows[:1]}"
    return [finding("padded_prompts", evidence)] if rows else []


def pad_is_eos(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Check whether the padding token is the end-of-sequence token; a warning if responses still hold padding."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None or pad is None:
        return []
    if pad != eos:
        padded = [row for row, tokens in enumerate(batch.responses) if _is_padded(tokens.tolist(), eos, pad)]
        evidence = f"{len(padded)} of {len(batch.responses)} responses end in padding ({pad}), e.g. {padded[:1]}"
        return [finding("padded_responses", evidence)] if padded else []
    padded = [row for row, tokens in enumerate(batch.responses) if len(tokens) > 1 and bool((tokens[-2:] == eos).all())]
    if padded:
        evidence = f"{len(padded)} of {len(batch.responses)} responses end in several {eos}, e.g. {padded[0]}"
        return [finding("pad_is_eos", evidence)]
    return [
        finding(
            "pad_is_eos", f"pad_token_id and eos_token_id are both {eos}", severity="note",
            cause="the tokenizer had no padding token. Nothing here depends on it, but code that finds the end by "
            "padding, or masks padding in a loss, loses the stop token",
            remedy="add a padding token of its own if such code is used",
        )
    ]  # fmt: skip


def _is_padded(tokens: list[int], eos: int, pad: int) -> bool:
    """Whether only padding follows the end of the sequence, which no sampler draws."""
    after = tokens[tokens.index(eos) + 1 :] if eos in tokens else []
    return bool(after) and set(after) == {pad}


def retokenization(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Check whether responses change when decoded and encoded again, and whether texts match the tokens."""
    special = set(tokenizer.all_special_ids)
    masks = batch.masks or [torch.ones(len(response), dtype=torch.bool) for response in batch.responses]
    own = [response[mask.to(response.device)] for response, mask in zip(batch.responses, masks, strict=True)]
    rows = [[token for token in response.tolist() if token not in special] for response in own]
    texts = [decode_tokens(tokenizer, row) for row in rows]
    findings: list[Finding] = []
    if batch.response_texts is not None and batch.masks is None:
        differing = [row for row, text in enumerate(texts) if text.strip() != batch.response_texts[row].strip()]
        if differing:
            shown = f"{batch.response_texts[differing[0]][:40]!r} for {texts[differing[0]][:40]!r}"
            evidence = (
                f"{len(differing)} of {len(texts)} texts are not those of the trained tokens, e.g. row {differing[0]}: "
                f"{shown}"
            )
            findings.append(finding("other_text", evidence))
    drifting = [row for row, text in enumerate(texts) if not _encodes_as(tokenizer, text, rows[row])]
    if drifting:
        evidence = f"{len(drifting)} of {len(texts)} responses become other tokens when their text is encoded again"
        findings.append(finding("retokenization", evidence, severity="note"))
    return findings


def _encodes_as(tokenizer: PreTrainedTokenizerBase, text: str, tokens: list[int]) -> bool:
    """Whether `text` is encoded as `tokens`."""
    try:
        return bool(tokenizer(text, add_special_tokens=False)["input_ids"] == tokens)
    except Exception:  # a tokenizer without an unknown token raises where it cannot spell the text
        return False


def reward_template(batch: DiagnosedBatch, _: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Collect the problems that reward sources with `check_texts` find in the texts."""
    if batch.sources is None or batch.prompt_texts is None or batch.response_texts is None:
        return None
    findings: list[Finding] = []
    for item in named_sources(batch.sources):
        if isinstance(item.source, SupportsTextChecks):
            for problem, cause, remedy in item.source.check_texts(batch.prompt_texts, batch.response_texts):
                evidence = f"reward source {item.name!r}: {problem}"
                findings.append(finding("reward_template", evidence, cause=cause, remedy=remedy))
    return findings


def masked_scores(batch: DiagnosedBatch, _: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Check whether scores are at tokens that the policy did not choose, which training drops."""
    given = batch.scores if batch.token_scores is None else batch.token_scores
    if given is None or given.dim() == 1 or batch.masks is None:
        return None
    dropped = [row[: len(mask)].cpu()[~mask] for row, mask in zip(given, batch.masks, strict=True)]
    rows = [row for row, scores in enumerate(dropped) if bool(scores.any())]
    if not rows:
        return []
    scores = torch.cat(dropped)
    evidence = (
        f"{int(scores.count_nonzero())} scores that sum to {float(scores.sum()):g} are at tokens that the policy did "
        f"not choose, in {len(rows)} of {len(dropped)} responses, e.g. response {rows[0]}"
    )
    return [finding("masked_scores", evidence)]


def equal_scores_or_responses(batch: DiagnosedBatch, _: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Check whether all scores are equal, or all responses."""
    findings: list[Finding] = []
    if batch.scores is not None and len(batch.scores) >= 4:
        totals = batch.scores if batch.scores.dim() == 1 else torch.stack(_own_totals(batch.scores, batch.masks))
        if float(totals.max()) == float(totals.min()):
            evidence = f"all {len(totals)} scores are {float(totals[0]):g}"
            findings.append(finding("equal_scores", evidence, severity="note"))
    texts = {tuple(response.tolist()) for response in batch.responses}
    prompts = {tuple(prompt.tolist()) for prompt in batch.prompts}
    if len(texts) == 1 and len(prompts) >= 4:
        evidence = f"{len(prompts)} prompts got one and the same response"
        findings.append(finding("equal_responses", evidence, severity="note"))
    return findings


def _own_totals(scores: Tensor, masks: Sequence[Tensor] | None) -> list[Tensor]:
    """Sum of each row of scores over the policy's own tokens."""
    if masks is None:
        return list(scores.sum(dim=1))
    return [row[: len(mask)][mask.to(row.device)].sum() for row, mask in zip(scores, masks, strict=True)]


TEXT_CHECKS: dict[str, Check] = {
    "eos_in_prompt": eos_in_prompt, "padded_prompts": padded_prompts, "pad_is_eos": pad_is_eos,
    "retokenization": retokenization, "reward_template": reward_template, "masked_scores": masked_scores,
    "equal_scores_or_responses": equal_scores_or_responses,
}  # fmt: skip


def run_text_checks(
    batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase, checks: Mapping[str, Check] = TEXT_CHECKS
) -> DoctorReport:
    """Run checks that need no model."""
    results = {name: check(batch, tokenizer) for name, check in checks.items()}
    made = {name: findings for name, findings in results.items() if findings is not None}
    return DoctorReport(findings=[finding for findings in made.values() for finding in findings], checked=list(made))


def select_rows(batch: DiagnosedBatch, *, rows: int, tokens: int) -> DiagnosedBatch:
    """The first rows, up to `rows` of them with up to `tokens` response tokens in total; at least one."""
    count, total = 0, 0
    for response in batch.responses[:rows]:
        total += len(response)
        if count and total > tokens:
            break
        count += 1

    def head(values: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        return None if values is None else values[:count]

    return DiagnosedBatch(
        prompts=batch.prompts[:count], responses=batch.responses[:count], masks=head(batch.masks),
        logprobs=head(batch.logprobs), sampling=batch.sampling,
    )  # fmt: skip


def select_actions(batch: DiagnosedBatch, values: Sequence[Tensor]) -> Tensor:
    """Concatenate the entries at the policy's actions, 1-D, from one row of entries per response."""
    if batch.masks is None:
        return torch.cat(list(values))
    return torch.cat([row[mask.to(row.device)] for row, mask in zip(values, batch.masks, strict=True)])
