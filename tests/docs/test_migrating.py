"""Claims of docs/migrating-from-trl.md beyond its table of defects, which has tests/classic/test_classic_defects.py."""

import pytest
import torch

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer


@pytest.mark.filterwarnings("ignore:No dataset is provided")
@pytest.mark.parametrize("per_token", [False, True])
def test_integer_and_per_token_scores_are_welcome(per_token: bool) -> None:
    """The response of two tokens earns 3, as one number or as 1 + 2."""
    config = PPOConfig(batch_size=2, mini_batch_size=2)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    trainer = PPOTrainer(config, model, None, tiny_tokenizer())
    score = torch.tensor([1, 2]) if per_token else torch.tensor(3)
    stats = trainer.step([torch.tensor([60, 61])] * 2, [torch.tensor([70, 71])] * 2, [score] * 2)
    assert stats["ppo/mean_scores"] == 3.0


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="learning_rat"):
        PPOConfig(learning_rat=1.0)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="learning_rat"):
        PPOConfig().learning_rat = 1.0  # type: ignore[attr-defined]
