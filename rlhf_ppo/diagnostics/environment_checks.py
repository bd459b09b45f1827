"""The doctor's checks of episodes with an environment: does the reward depend on what the policy wrote?"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.chat.encoding import decode_tokens
from rlhf_ppo.diagnostics.findings import Finding, finding
from rlhf_ppo.diagnostics.text_checks import Check, DiagnosedBatch
from rlhf_ppo.environments import Episode
from rlhf_ppo.environments.replay import replay
from rlhf_ppo.rewards.calls import RewardRequest, WeightedSource, accepted_keywords, call_sources
from rlhf_ppo.rewards.sources import named_sources

MAX_EPISODES = 8
"""Maximum number of episodes that are played again."""


def reward_survives_empty_reply(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Play rewarded episodes again with an empty last reply: a reward that stays was not earned by the reply."""
    if batch.episodes is None or batch.environment is None:
        return None
    rewarded = [
        row
        for row, episode in enumerate(batch.episodes)
        if episode.turns > 1 and float(episode.rewards[episode.mask][-1]) > 0
    ][:MAX_EPISODES]
    replies = [_decode(batch.episodes[row].replies(), tokenizer) for row in rewarded]
    tasks = [batch.tasks[row] for row in rewarded]
    seen = replay(batch.environment, tasks, replies)
    without = replay(batch.environment, tasks, [[*texts[:-1], ""] for texts in replies])
    kept = [
        turns[-1].reward == others[-1].reward
        for turns, others, texts in zip(seen, without, replies, strict=True)
        if turns is not None and others is not None and len(turns) == len(others) == len(texts)
    ]
    if not kept or sum(kept) * 2 < len(kept):
        return [] if kept else None
    evidence = f"{sum(kept)} of {len(kept)} rewarded last replies earn the same when they are replaced by an empty text"
    return [finding("reward_survives_empty_reply", evidence)]


def source_reads_observations(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Call sources that read transcripts again, without the policy's own text: a score that stays is not its own."""
    if batch.episodes is None or batch.sources is None or batch.prompt_texts is None or batch.response_texts is None:
        return None
    heard = _observations(batch.episodes, tokenizer)
    rows = [row for row, text in enumerate(heard) if text][:MAX_EPISODES]
    columns = {name: [values[row] for row in rows] for name, values in batch.columns.items()}
    prompts = [batch.prompt_texts[row] for row in rows]
    played = RewardRequest(prompts=prompts, responses=[batch.response_texts[row] for row in rows], columns=columns)
    columns = columns | {"transcripts": [heard[row] for row in rows]}
    silent = RewardRequest(prompts=prompts, responses=[""] * len(rows), columns=columns)
    findings = []
    for source in named_sources(batch.sources):
        if not rows or "transcripts" not in accepted_keywords(source, played):
            continue
        before, after = (_scores(source, request) for request in (played, silent))
        same = [x == y for x, y in zip(before, after, strict=True) if x > 0]
        if same and sum(same) * 2 >= len(same):
            evidence = (
                f"reward source {source.name!r} gives {sum(same)} of {len(same)} episodes the same score when the "
                "policy's own text is removed and only the observations are left"
            )
            findings.append(finding("source_reads_observations", evidence))
    return findings


def dead_environment(batch: DiagnosedBatch, tokenizer: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Check whether all episodes hear the same and earn the same, however they are played."""
    if batch.episodes is None or len(batch.episodes) < 4:
        return None
    totals = {episode.total_reward for episode in batch.episodes}
    heard = set(_observations(batch.episodes, tokenizer))
    played = {tuple(episode.response_ids[episode.mask].tolist()) for episode in batch.episodes}
    if len(totals) > 1 or len(heard) > 1 or len(played) == 1:
        return []
    evidence = f"{len(played)} different ways to play all earn {totals.pop():g} and hear {heard.pop()[:40]!r}"
    return [finding("dead_environment", evidence)]


def groups_without_variance(batch: DiagnosedBatch, _: PreTrainedTokenizerBase) -> list[Finding] | None:
    """Check how many groups of responses to one prompt have equal scores, from which RLOO and GRPO learn nothing."""
    if batch.scores is None or batch.group_size < 2 or len(batch.scores) < 4 * batch.group_size:
        return None
    totals = batch.scores if batch.scores.dim() == 1 else batch.scores.sum(dim=1)
    groups = totals.reshape(-1, batch.group_size)
    equal = int((groups == groups[:, :1]).all(dim=1).sum())
    if equal < 0.9 * len(groups):
        return []
    return [finding("groups_without_variance", f"{equal} of {len(groups)} groups have equal scores")]


def _decode(rows: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [decode_tokens(tokenizer, row.tolist(), skip_special_tokens=True) for row in rows]


def _observations(episodes: Sequence[Episode], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The environment's text in each episode."""
    return _decode([episode.response_ids[~episode.mask] for episode in episodes], tokenizer)


def _scores(source: WeightedSource, request: RewardRequest) -> list[float]:
    """Scores of a source, summed over tokens; nan where it failed or skipped a sample."""
    (result,) = call_sources([source], request, keep_going=True)
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list) or len(values) != len(request.prompts):
        return [math.nan] * len(request.prompts)
    return [math.nan if value is None else float(torch.as_tensor(value).double().sum()) for value in values]


ENVIRONMENT_CHECKS: dict[str, Check] = {
    "reward_survives_empty_reply": reward_survives_empty_reply, "source_reads_observations": source_reads_observations,
    "dead_environment": dead_environment, "groups_without_variance": groups_without_variance,
}  # fmt: skip
