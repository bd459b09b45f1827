"""Counted work of one PPO iteration on responses of very unequal lengths: gates that no machine's mood can move."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo.kernels import memory
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.updates.sharding import assign_rows
from rlhf_ppo.updates.shuffle import Shuffle
from tests.benchmarks.allocations import peak_bytes
from tests.benchmarks.ppo import prepare
from tests.benchmarks.sides import Ours
from tests.benchmarks.workloads import WORKLOADS, Workload

TINY = WORKLOADS["tiny"]
"""The lengths of cpu-skew: 32 prompts of 64 tokens, responses of 5 to 128, 40 on average."""


def side(workload: Workload, folder: Path, **options: Any) -> Ours:
    """Ours on this workload, the step not yet made."""
    return Ours(prepare(workload, folder), options)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Counters of two iterations with the same draws: the first finds out that the sampler's word can be taken."""
    ours = side(TINY, tmp_path_factory.mktemp("work"))
    found = []
    for _ in range(2):
        ours.reset()
        ours.generate()
        ours.step()
        found.append(ours.work())
    return found


@pytest.mark.slow
def test_padding_adds_at_most_15_percent_to_the_trunk(work: list[dict[str, float]]) -> None:
    for counts in work:
        assert counts["work/trunk_tokens"] <= 1.15 * counts["work/real_tokens"]


def test_no_pass_asks_for_old_log_probabilities_once_the_sampler_s_are_proved(work: list[dict[str, float]]) -> None:
    """The reference is not counted: what is left are the passes of the epochs."""
    tokens = sum(TINY.lengths()) + TINY.rows * TINY.prompt
    assert [counts["work/real_tokens"] / tokens for counts in work] == [TINY.epochs + 1, TINY.epochs]
    assert [counts["sampler/reused"] for counts in work] == [0.0, 1.0]


def test_the_lm_head_runs_on_the_response_tokens_of_each_pass_alone(work: list[dict[str, float]]) -> None:
    heads = [counts["work/head_rows"] / sum(TINY.lengths()) for counts in work]
    assert heads == [TINY.epochs + 1, TINY.epochs]


def test_the_last_layer_runs_on_the_states_alone_that_are_read(work: list[dict[str, float]]) -> None:
    """One behind each response token, and one before the first, where V(s_0) stands and the first token is drawn."""
    states = sum(TINY.lengths()) + TINY.rows
    assert [counts["work/last_layer_tokens"] / states for counts in work] == [TINY.epochs + 1, TINY.epochs]


def test_the_decode_loop_computes_at_most_a_quarter_more_than_the_response_tokens() -> None:
    """The fewest possible: a row's first token comes from the prefill, so that its other tokens are its row-steps."""
    config = SamplingConfig(max_new_tokens=TINY.cap)
    samples = DecodeLoop()(TINY.model(), TINY.prompts(), config, limits=TINY.lengths())
    work, tokens = samples.counts, sum(TINY.lengths())
    assert work.response_tokens == tokens
    assert work.decode_row_steps == tokens - TINY.rows
    assert work.prefill_tokens == TINY.rows * TINY.prompt
    assert work.lm_head_rows == tokens


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_have_equal_work_in_every_optimizer_step_to_five_percent(processes: int) -> None:
    """What each waits for the slowest in each step: tokens of the busiest process over the mean, 16 rows a process.

    Once as often as an update shuffles: with cpu-skew's lengths, 8 rows of an optimizer step for each process.
    """
    workload = replace(TINY, rows=TINY.rows * processes)
    costs, shuffle = torch.tensor(workload.lengths()) + workload.prompt, Shuffle(0)
    most = mean = 0.0
    for _ in range(workload.epochs):
        for rows in shuffle(workload.rows, torch.device("cpu")).split(workload.minibatch * processes):
            tokens = [int(costs[rows][share].sum()) for share in assign_rows(costs[rows], processes)]
            most, mean = most + max(tokens), mean + sum(tokens) / processes
            assert sum(tokens) == int(costs[rows].sum())
    assert most / mean <= 1.05


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rollout(tmp_path: Path) -> None:
    """Only one minibatch's activations and one chunk's logits live at a time: twice the rows need hardly more."""
    rows = {}
    for count in (16, 32):
        (folder := tmp_path / str(count)).mkdir()
        equal = replace(TINY, vocab=4000, rows=count, prompt=8, cap=24, lengths_are="full", epochs=1)
        rows[count] = peak_bytes(side(equal, folder).step)
    assert rows[32] <= 1.05 * rows[16]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere all stays on the heap")
def test_all_minibatches_of_an_update_take_the_same_pages_and_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their rows are of other lengths, so that the tensors are of other sizes."""
    taken: list[int] = []
    new = memory.mmap.mmap

    def counted(number: int, size: int, **settings: int) -> object:
        taken.append(size)
        return new(number, size, **settings)

    monkeypatch.setattr(memory.mmap, "mmap", counted)
    found, pages = [], []
    for least in (1, math.inf):
        monkeypatch.setattr(memory, "MIN_BYTES", least)
        ours = side(TINY, tmp_path)
        taken.clear()  # the proof of the fast paths has pages of its own
        ours.step()
        pages.append(len(taken))
        found.append(torch.cat([parameter.detach().flatten() for parameter in ours.model.parameters()]))
    assert pages == [1, 0]
    assert_close(*found, rtol=0, atol=0)


def test_the_gate_on_memory_notices_a_kept_logit_of_every_token() -> None:
    kept: list[torch.Tensor] = []
    few, many = (peak_bytes(lambda count=count: kept.append(torch.ones(count, 4000))) for count in (16, 32))
    assert (few, many) == (16 * 16_000, 32 * 16_000)
