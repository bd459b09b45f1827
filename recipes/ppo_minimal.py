"""PPO in one page: prompts, a reward function, a policy and its frozen reference.

    python recipes/ppo_minimal.py --model gpt2
    accelerate launch recipes/ppo_minimal.py --model my/sft-folder --iterations 200

The reward is VADER, a lexicon that scores the sentiment of a text from -1 to 1; replace `reward` by any function of the
texts. Left out: supervised fine-tuning and a learned reward model, which recipes/ppo_gpt2_sentiment.py has.
"""

if __name__ == "__main__":  # before torch is loaded, which reads it once
    from rlhf_ppo.utils.openmp import spin_shortly

    spin_shortly()

from typing import Any

import tyro
from datasets import Dataset
from transformers import AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig, TrainState
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig

SUBJECTS = ("The movie", "This film", "The story", "Its first half", "The ending", "My friend", "The actor", "It")
VERBS = ("was", "is", "made me", "has", "seemed", "felt", "looked", "could have been")
PROMPTS = Dataset.from_dict({"prompt": [f"{subject} {verb}" for subject in SUBJECTS for verb in VERBS]})
JUDGE = SentimentIntensityAnalyzer()


def reward(prompts: list[str], responses: list[str], **_: Any) -> list[float]:
    """Score each text by its sentiment."""
    return [JUDGE.polarity_scores(prompts[row] + responses[row])["compound"] for row in range(len(prompts))]


def main(
    model: str = "gpt2",
    output_dir: str = "runs/ppo_minimal",
    iterations: int = 50,
    batch_size: int = 64,
    learning_rate: float = 1.41e-5,
) -> TrainState:
    """Train `model`, a folder or a name on the hub, and save the policy in `output_dir`/model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model)

    config = PPOConfig(batch_size=batch_size, mini_batch_size=batch_size // 4, learning_rate=learning_rate)
    trainer = PPOTrainer(config, policy, None, tokenizer, dataset=PromptDataset(PROMPTS, tokenizer))

    loop = TrainConfig(iterations=iterations, sampling=SamplingConfig(max_new_tokens=24), output_dir=output_dir)
    state = trainer.train(reward, loop)
    trainer.save_pretrained(f"{output_dir}/model")
    return state


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
