"""Two consecutive `step()` calls reproduce the statistics that TRL's classic trainer (0.11.4) recorded."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from tests.support.tiny_models import tiny_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "classic_ppo.json").read_text())["C_end_to_end"]
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults,1 epoch": {"ppo_epochs": 1},
    "kl_penalty=full,2 epochs": {"kl_penalty": "full", "ppo_epochs": 2},
}


def formula_model(phase: float) -> AutoModelForCausalLMWithValueHead:
    """The recorded model: every weight a closed formula of its running index, so that no download is needed."""
    config = GPT2Config(
        vocab_size=40, n_positions=64, n_embd=32, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(GPT2LMHeadModel(config))
    fill_by_formula(model, phase)
    return model


def fill_by_formula(model: nn.Module, phase: float) -> None:
    """w_i = 0.1 sin(0.7 i + phase + 0.3 sin(0.013 i)) over the sorted names; layer norms' weights are 1 + w."""
    start = 0
    for name, parameter in sorted(model.named_parameters()):
        index = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
        values = 0.1 * torch.sin(0.7 * index + phase + 0.3 * torch.sin(0.013 * index))
        if ".ln_" in name and name.endswith("weight"):
            values = 1 + values
        parameter.data.copy_(values.reshape(parameter.shape))
        start += parameter.numel()


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("case", sorted(GOLDEN["cases"]))
def test_two_steps_give_the_recorded_statistics(case: str, padding_side: str) -> None:
    """The padding side of the tokenizer must not matter: the classic was wrong on the left one."""
    config = PPOConfig(batch_size=4, mini_batch_size=4, learning_rate=1e-4, **SETTINGS[case])
    tokenizer = tiny_tokenizer(padding_side=padding_side)
    trainer = PPOTrainer(config, formula_model(0.0), formula_model(0.05), tokenizer)
    queries = [torch.tensor(query) for query in GOLDEN["queries"]]
    responses = [torch.tensor(response) for response in GOLDEN["responses"]]
    scores = [torch.tensor(score) for score in GOLDEN["scores"]]
    for step in ("step1", "step2"):
        statistics = trainer.step(queries, responses, scores)
        for name, expected in GOLDEN["cases"][case][step].items():
            assert math.isclose(float(statistics[name]), expected, rel_tol=1e-3, abs_tol=1e-3), (step, name)
    recorded = GOLDEN["cases"][case]["kl_dist_step2"]
    assert torch.allclose(torch.as_tensor(statistics["objective/kl_dist"]), torch.tensor(recorded), atol=1e-3)
