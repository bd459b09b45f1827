"""Episodes of an environment, and a reward model's scores, on a pretended GPU: no devices mix."""

from pathlib import Path

import pytest
from torch.testing import assert_close

from reward_model import RewardModel
from rlhf_ppo import TrainConfig
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.gpu.runs import trainer
from tests.reward_model.conftest import classifier, saved
from tests.support.games import CountE
from tests.support.pretend_cuda import Counts
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_tokenizer
from tests.support.tiny_run import TEXTS

PAIRS = {"prompts": ["The movie was "] * 3, "responses": ["good", "a terrible story", "great"]}


@pytest.mark.slow
def test_episodes_of_an_environment_are_played_and_learned_from(gpu: Counts) -> None:
    made = trainer(tiny_gpt2(), diagnose=False)
    sampling = SamplingConfig(max_new_tokens=4, stop_token_ids=(EOS_TOKEN_ID,), num_return_sequences=2)
    settings = TrainConfig(iterations=1, sampling=sampling, progress=False)
    prompts = PromptDataset.from_texts(TEXTS, tiny_tokenizer())
    state = made.train(None, settings, environment=CountE, prompts=prompts)
    assert state.metrics["env/turns"] == 3
    assert state.metrics["env/token_drift"] == 0


def test_a_reward_model_scores_as_on_the_cpu(gpu: Counts, tmp_path: Path) -> None:
    folder = saved(classifier(tiny_gpt2().config), tmp_path)
    expected = RewardModel.from_pretrained(folder, device="cpu")(**PAIRS)
    found = RewardModel.from_pretrained(folder, device="cuda")(**PAIRS)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(set(found)) == 3
