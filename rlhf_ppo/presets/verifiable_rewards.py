"""Settings of runs of 2025 and 2026 on verifiable rewards, each value with its source, for `rlhf_ppo.presets`.

What a source leaves open, or what was not read there, keeps
the default of `PPOConfig` or of the algorithm.
"""

from typing import Any

from rlhf_ppo.algorithms import CISPO, GAE, GRPO, GSPO, Critic, PositiveNLL, PPOClip

Values = dict[str, tuple[Any, str]]

_ORZ = "Open-Reasoner-Zero/Open-Reasoner-Zero, config.py"
_ORZ_PAPER = "Hu et al. (2025), Open-Reasoner-Zero, arXiv 2503.24290"
_DAPO = "Yu et al. (2025), DAPO, arXiv 2503.14476, section 4.1"
_DAPO_RUN = "volcengine/verl, recipe/dapo/run_dapo_qwen2.5_32b.sh"
_VAPO = "Yue et al. (2025), VAPO, arXiv 2504.05118"
_TURN = "Li et al. (2025), Turn-PPO, arXiv 2512.17008"
_SAO = "Hou et al. (2026), SAO, arXiv 2607.07508 v1, settings for mathematics, as a review of it lists them"
_DR_GRPO = "Liu et al. (2025), Understanding R1-Zero-like training, arXiv 2503.20783"
_R1_ZERO = "sail-sg/understand-r1-zero, examples/qwen2.5-math-7b.sh"
_GSPO = "Zheng et al. (2025), GSPO, arXiv 2507.18071, section 5.1"


def _without_kl(source: str) -> Values:
    return {"kl_penalty": ("none", source), "init_kl_coef": (0.0, source)}


RECENT: dict[str, dict[str, Any]] = {
    "orz": {
        "title": "Open-Reasoner-Zero",
        "values": {
            "batch_size": (8192, f"{_ORZ}: rollout_batch_size 128 x n_samples_per_prompt 64; over all processes"),
            "mini_batch_size": (8192, f"{_ORZ}: policy_update_steps 1"),
            "ppo_epochs": (1, f"{_ORZ}: policy_update_steps 1"),
            "learning_rate": (1e-6, f"{_ORZ}: actor_learning_rate"),
            "temperature": (1.0, f"{_ORZ}: temperature"),
            **_without_kl(f"{_ORZ}: init_kl_coef 0, kl_loss_coef 0"),
        },
        "fields": {
            "new_tokens": (8000, f"{_ORZ}: generate_max_len"), "group_size": (64, f"{_ORZ}: n_samples_per_prompt"),
            "separate_critic": (True, f"{_ORZ_PAPER}: a value network"),
            "algorithm": (
                PPOClip(gae=GAE(gamma=1.0, lam=1.0), critic=Critic(learning_rate=5e-6, extra_fits=11)),
                f"{_ORZ_PAPER}: γ = λ = 1; {_ORZ}: critic_learning_rate 5e-6, critic_update_steps 12",
            ),
        },
        "remarks": "Its 12 critic steps divide the batch; here the joint step and 11 further ones see all of it. Both "
        "rates warmed up over 50 steps. Clip ranges are the defaults.",
    },
    "vapo": {
        "title": "VAPO: efficient and reliable reinforcement learning for advanced reasoning tasks",
        "values": {"batch_size": (8192, f"{_VAPO}, table 1: 512 prompts x 16 responses; over all processes")},
        "fields": {
            "group_size": (16, f"{_VAPO}, table 1: 16 responses to a prompt"),
            "separate_critic": (True, f"{_VAPO}: a value network"),
            "algorithm": (
                PPOClip(
                    clip_low=0.2, clip_high=0.28, positive_nll=PositiveNLL(coef=0.1),
                    gae=GAE(gamma=1.0, value_lam=1.0, length_alpha=0.05), critic=Critic(warmup_iterations=50),
                ),
                f"{_VAPO}: clip-higher 0.2 and 0.28, μ = 0.1, λ_critic = 1, α = 0.05, value pretraining of 50 steps",
            ),
        },
        "remarks": "Learning rates, minibatches and the KL are not part of the preset. λ of `length_alpha` is kept in "
        "[0.5, 1] here.",
    },
    "turn-ppo": {
        "title": "Turn-PPO: turn-level advantage estimation for multi-turn agents",
        "values": {},
        "fields": {
            "algorithm": (
                PPOClip(gae=GAE(unit="turn", gamma=0.99, lam=0.9)), f"{_TURN}: γ = 0.99 and λ = 0.9 over turns"
            ),
        },
        "remarks": "It clipped the ratio of a turn; this clips that of a token. Learning rates, sizes and the KL are "
        "not part of the preset; its critic learned faster than its policy.",
    },
    "sao": {
        "title": "SAO: one rollout per prompt and a critic",
        "values": {
            "batch_size": (128, f"{_SAO}: 128 prompts x 1 response; over all processes"),
            "ppo_epochs": (1, f"{_SAO}: one update of the policy"), "learning_rate": (1e-6, _SAO),
            "importance_sampling": ("bypass", f"{_SAO}: ratios to the sampler, without an old policy"),
        },
        "fields": {
            "separate_critic": (True, f"{_SAO}: a value network"),
            "algorithm": (
                PPOClip(
                    cispo=CISPO(min_weight=0.7, max_weight=6.0, drop=True), gae=GAE(value_lam=1.0, length_alpha=1.5),
                    critic=Critic(learning_rate=5e-6, extra_fits=1, warmup_iterations=10, freeze="attention"),
                ),
                f"{_SAO}: ratios outside 0.7 and 6 dropped, α = 1.5, critic λ 1, 5e-6, 2 updates, warm-up 10, frozen",
            ),
        },
        "remarks": "For code it dropped ratios outside 1 - 0.8 and 1 + 3.0. `step()` knows no probabilities of the "
        "sampler: use importance_sampling='off' there. The KL is not part of the preset.",
    },
    "dapo": {
        "title": "DAPO: an open-source LLM reinforcement learning system at scale",
        "values": {
            "batch_size": (8192, f"{_DAPO}: 512 prompts x 16 responses; over all processes"),
            "mini_batch_size": (512, f"{_DAPO}: 16 updates per rollout"),
            "ppo_epochs": (1, f"{_DAPO}: 16 updates per rollout"),
            "learning_rate": (1e-6, f"{_DAPO}: constant, after a warm-up of 20 rollouts"),
            "optimizer": ("adamw", _DAPO), "max_grad_norm": (1.0, f"{_DAPO_RUN}: grad_clip"),
            "temperature": (1.0, f"{_DAPO_RUN}: temperature"),
            **_without_kl(f"{_DAPO}: no KL term"),
        },
        "fields": {
            "new_tokens": (20480, f"{_DAPO}: 16,384 and a buffer of 4,096"), "group_size": (16, _DAPO),
            "overlong_share": (0.2, f"{_DAPO}: a buffer of 4,096 of 20,480 tokens"),
            "dynamic_sampling": (True, _DAPO),
            "algorithm": (GRPO(clip_low=0.2, clip_high=0.28), f"{_DAPO}: ε_low 0.2, ε_high 0.28, mean over tokens"),
        },
        "remarks": "The warm-up of the learning rate is the scheduler's. The reproduction in verl decayed weights by "
        "0.1, AdamW here by 0.01, and chose groups by accuracy, `dynamic_sampling` by the whole score.",
    },
    "dr-grpo": {
        "title": "Understanding R1-Zero-like training: Dr. GRPO",
        "values": {
            "batch_size": (1024, f"{_R1_ZERO}: rollout_batch_size 128 x num_samples 8; over all processes"),
            "mini_batch_size": (128, f"{_R1_ZERO}: train_batch_size"),
            "ppo_epochs": (1, f"{_R1_ZERO}: num_ppo_epochs"), "learning_rate": (1e-6, f"{_R1_ZERO}: constant"),
            "temperature": (1.0, _R1_ZERO), **_without_kl(f"{_R1_ZERO}: beta 0"),
        },
        "fields": {
            "group_size": (8, f"{_R1_ZERO}: num_samples"), "new_tokens": (3000, f"{_R1_ZERO}: generate_max_length"),
            "algorithm": (GRPO(normalize_std=False), f"{_DR_GRPO}: no division by the deviation, none by the length"),
        },
        "remarks": "It divides sums of tokens by a constant; this divides by the tokens of the optimizer step. There a "
        "response that was cut scores 0.",
    },
    "gspo": {
        "title": "Group sequence policy optimization",
        "values": _without_kl("volcengine/verl, pull request 2775: no KL"),
        "fields": {
            "algorithm": (GSPO(clip_low=3e-4, clip_high=4e-4), f"{_GSPO}: clip ranges 3e-4 and 4e-4"),
        },
        "remarks": "Each rollout was cut into four minibatches; learning rate and sizes are not part of the preset.",
    },
}  # fmt: skip
"""Name of a preset -> title, values of `PPOConfig`, further fields, remarks; every value with its source."""
