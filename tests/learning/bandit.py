"""A token bandit with a known optimum: one prompt, responses of one token, eight tokens, through `PPOTrainer.learn`.

With the KL to the reference in the reward the optimum is π*(a) ∝ π_ref(a) exp(r(a) / kl_coef), without it the best
token. A tiny GPT-2 is the policy, so that every weight is shared between the actions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rlhf_ppo import AlgorithmConfig, AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.rollout.experience import Responses
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

ACTIONS = 8
REWARDS = torch.tensor([0.0, 1.0, 0.2, -0.5, 0.6, -1.0, 0.8, 0.1])
PROMPT = torch.tensor([3, 5])
ROWS = 128


def bandit(
    algorithm: AlgorithmConfig, *, kl_coef: float, iterations: int = 60, learning_rate: float = 0.02, **settings: Any
) -> PPOTrainer:
    """A trainer whose learning rate falls linearly to 0 over `iterations`."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_gpt2(vocab_size=ACTIONS, n_layer=1, n_embd=16, n_positions=8), v_head_init_strategy="normal"
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    defaults: dict[str, Any] = {"batch_size": ROWS, "mini_batch_size": ROWS // 2, "ppo_epochs": 2}
    return PPOTrainer(
        PPOConfig(init_kl_coef=kl_coef, adap_kl_ctrl=False, **defaults | settings), model, tokenizer=tiny_tokenizer(),
        optimizer=optimizer, lr_scheduler=LambdaLR(optimizer, lambda step: max(0.0, 1 - step / iterations)),
        algorithm=algorithm,
    )  # fmt: skip


def probabilities(trainer: PPOTrainer) -> Tensor:
    """The policy's probability of each token."""
    inputs = TokenInputs(prompts=[PROMPT] * ACTIONS, responses=list(torch.arange(ACTIONS).split(1)))
    return trainer.scorer(inputs).logprobs[:, 0].exp()


def optimum(trainer: PPOTrainer, kl_coef: float) -> Tensor:
    """π_ref exp(r / kl_coef) / Z; the best token where the KL costs nothing."""
    if kl_coef == 0.0:
        return (REWARDS.max() == REWARDS).float()
    inputs = TokenInputs(prompts=[PROMPT] * ACTIONS, responses=list(torch.arange(ACTIONS).split(1)))
    return torch.softmax(trainer.scorer(inputs).ref_logprobs[:, 0] + REWARDS / kl_coef, dim=0)


def play(trainer: PPOTrainer, iterations: int, *, group_size: int = 1) -> None:
    """So many iterations of draw, score, learn."""
    generator = torch.Generator().manual_seed(trainer.config.seed)
    for _ in range(iterations):
        actions = torch.multinomial(probabilities(trainer), ROWS, replacement=True, generator=generator)
        trainer.learn(
            Responses(
                inputs=TokenInputs(prompts=[PROMPT] * ROWS, responses=list(actions.split(1))),
                mask=torch.ones(ROWS, 1, dtype=torch.bool), scores=REWARDS[actions], group_size=group_size,
            )
        )  # fmt: skip


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of absolute differences, in [0, 1]."""
    return 0.5 * float((p - q).abs().sum())
