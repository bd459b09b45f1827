"""The findings of the doctor, each with its usual cause and remedy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

Severity: TypeAlias = Literal["warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem that a check of the doctor has found."""

    name: str
    """Key of the finding, see `KNOWN_FINDINGS`."""
    severity: Severity
    """"warning": the run would learn something else than intended. "note": harmless here, not everywhere."""
    evidence: str
    """What was observed, with numbers."""
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}. Cause: {self.cause}. Remedy: {self.remedy}."


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """The findings of one run of the doctor."""

    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    """Names of the checks that were made; a check needs the fields of the batch that it reads."""

    @property
    def is_healthy(self) -> bool:
        """Whether there is no finding of severity "warning"."""
        return not self.warnings

    @property
    def warnings(self) -> list[Finding]:
        """Findings of severity "warning"."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    def names(self) -> set[str]:
        return {finding.name for finding in self.findings}

    def __str__(self) -> str:
        if not self.findings:
            return f"Nothing found in {len(self.checked)} checks: {', '.join(self.checked)}."
        return "\n".join(f"[{finding.severity}] {finding}" for finding in self.findings)


class KnownFinding(NamedTuple):
    """Usual cause and remedy of a finding."""

    cause: str
    remedy: str


KNOWN_FINDINGS: dict[str, KnownFinding] = {
    "padding": KnownFinding(
        "the model sees padding or other rows: positions counted from the wrong end, attention to what follows",
        "use an unchanged causal model of transformers; check custom attention and position ids",
    ),
    "scoring": KnownFinding(
        "the model's forward pass was changed after the trainer was built, which proved its faster computation before",
        "change the model first, then build the trainer",
    ),
    "ratio": KnownFinding(
        "the model is not deterministic: dropout is on, or its layers draw random numbers",
        "set every dropout of the model's configuration to 0; the trainer switches to eval mode, but code that ignores "
        "it (functional dropout, custom layers) must be changed",
    ),
    "sampler": KnownFinding(
        "temperature, top_k, top_p, a penalty or a minimum length in sampling; other weights or another precision in "
        "the sampler, or an engine that took over a part of the weights only (vLLM on a CPU with a tied LM head); or "
        "responses that were encoded again from text",
        "sample with the trainer's temperature and nothing else, from the present weights; for an engine of another "
        "precision set `importance_sampling`",
    ),
    "sampling": KnownFinding(
        "tokens come from a distribution that is not the policy's: ratios and KL compare the wrong ones",
        "leave these at their defaults and shape the policy by the reward instead",
    ),
    "truncated": KnownFinding(
        "greedy decoding, or top_k or top_p (transformers' default top_k is 50)",
        "generate with do_sample=True, top_k=0, top_p=1.0",
    ),
    "temperature": KnownFinding(
        "a temperature below `PPOConfig.temperature` in generation, or tokens of a sharper policy",
        "give generation and `PPOConfig.temperature` the same value",
    ),
    "unlikely_tokens": KnownFinding(
        "tokens of other weights, of another prompt, or encoded again from text; or a temperature above "
        "`PPOConfig.temperature` in generation: tokens without the sampler's log-probabilities cannot tell which",
        "pass the tokens that the present weights have drawn after these prompts, at the trainer's temperature",
    ),
    "reference": KnownFinding(
        "`ref_model` is not the model that training starts from",
        "pass `ref_model=None`: the trainer then takes the starting point, adapters included; keep another reference "
        "only on purpose",
    ),
    "eos_in_prompt": KnownFinding(
        "the tokenizer appends it, prompts were padded with it, or several texts were joined by it; to the model it "
        "says that the text is over",
        "encode prompts without it (`add_eos_token=False`) and without padding, or cut them at the last one",
    ),
    "padded_prompts": KnownFinding(
        "rows of a padded batch were passed (`padding=True`, a padding collator): `generate` and `step` take padding "
        "for text, as the classic did",
        "pass each prompt's own tokens: `ids[attention_mask.bool()]`",
    ),
    "pad_is_eos": KnownFinding(
        "pad_token_id is eos_token_id and the padding of a batched `generate` was not cut off: the policy is rewarded "
        "for tokens that it never drew",
        "cut each response after its first end-of-sequence token (`trainer.generate` does)",
    ),
    "padded_responses": KnownFinding(
        "the padding of a batched `generate` was not cut off: the policy is rewarded for tokens that it never drew",
        "cut each response after its first end-of-sequence token (`trainer.generate` does)",
    ),
    "other_text": KnownFinding(
        "the text was cut or changed after sampling, or the response encoded again from it",
        "score the decoded tokens, and pass the tokens that were sampled",
    ),
    "retokenization": KnownFinding(
        "several token sequences spell one text, and a policy draws all of them",
        "never train on encoded text: `step` and `train` keep the sampled tokens; so must code around them",
    ),
    "masked_scores": KnownFinding(
        "a reward was given for tokens of an environment or a tool, which take no gradient: their scores are dropped",
        "credit the reward of a turn to the last token that the policy wrote in it",
    ),
    "reward_survives_empty_reply": KnownFinding(
        "the environment's reward reads the text of a tool as the answer, or does not depend on what the policy writes",
        "compute the reward of a turn from the argument of `step`, not from the transcript",
    ),
    "source_reads_observations": KnownFinding(
        "it takes text of the environment (the output of a tool, an example in the task) for the policy's answer",
        "read the policy's own replies, the argument `responses`, or the part of the transcript that it wrote",
    ),
    "dead_environment": KnownFinding(
        "the environment does not react to the replies: it does not parse them, or always returns the same turn",
        "step it by hand with a right reply and read the answer and the reward; check that the policy can write one",
    ),
    "groups_without_variance": KnownFinding(
        "all episodes of a task succeed, or all fail: their advantages within the group are 0",
        "choose easier or harder tasks, larger groups, or an algorithm with a critic",
    ),
    "equal_scores": KnownFinding(
        "the reward does not tell these responses apart",
        "look at the samples; a reward must differ between responses for anything to be learned",
    ),
    "equal_responses": KnownFinding(
        "the policy has collapsed, or its prompts do not reach it",
        "read the samples; start again from an earlier model",
    ),
}
"""Name of a finding -> its usual cause and remedy."""

DRAWS = frozenset({"truncated", "temperature", "unlikely_tokens"})
"""Findings from the sampled tokens alone."""
CONSEQUENCES: dict[str, frozenset[str]] = {
    "ratio": DRAWS | {"padding", "scoring", "sampler", "reference"},  # all compare passes that differ by themselves
    "padding": DRAWS | {"sampler", "reference"},
    "scoring": DRAWS | {"sampler", "reference"},
    "pad_is_eos": DRAWS | {"sampler"},
    "padded_responses": DRAWS | {"sampler"},
    "sampling": DRAWS | {"sampler"},
    "sampler": DRAWS,
    "reward_survives_empty_reply": frozenset({"dead_environment", "groups_without_variance"}),
    "dead_environment": frozenset({"groups_without_variance"}),
}
"""Name of a finding -> findings that it brings about: as long as it stands, they cannot be told apart from it."""


def without_consequences(findings: Sequence[Finding]) -> list[Finding]:
    """Leave out the warnings that another warning brings about."""
    warned = [finding.name for finding in findings if finding.severity == "warning"]
    explained = frozenset().union(*(CONSEQUENCES.get(name, frozenset()) for name in warned))
    return [finding for finding in findings if finding.severity == "note" or finding.name not in explained]


def finding(
    name: str, evidence: str, *, severity: Severity = "warning", cause: str | None = None, remedy: str | None = None
) -> Finding:
    """Make a finding with its usual cause and remedy, unless others are given.

    Args:
        name: Name of the finding; in `KNOWN_FINDINGS` unless `cause` and `remedy` are given.
        evidence: What was observed, with numbers.
        cause: Replaces the usual one.
        remedy: Replaces the usual one.
    """
    known = KNOWN_FINDINGS.get(name, KnownFinding("", ""))
    return Finding(
        name=name, severity=severity, evidence=evidence, cause=cause or known.cause, remedy=remedy or known.remedy
    )
