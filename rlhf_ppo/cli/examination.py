"""What `rlhf-ppo doctor` does: a batch of a model's own responses under the doctor."""

import torch
from transformers import AutoTokenizer

from rlhf_ppo.cli.ppo_run import load_prompts
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.models.fast_paths import COSTS
from rlhf_ppo.models.pretrained import AutoModelForCausalLMWithValueHead
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.utils.model_names import check_model_name

TEXTS = ("The film was", "Once upon a time", "How do I", "It is")
ROWS = 4


def examine(model: str, prompts: str | None, max_new_tokens: int) -> tuple[list[str], bool]:
    """The findings and the fast paths as lines, and whether no finding is a warning.

    Raises:
        ValueError: The model or the prompts cannot be used.
    """
    check_model_name(model)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    trainer = PPOTrainer(PPOConfig(batch_size=ROWS, mini_batch_size=ROWS), policy, None, tokenizer)
    data = PromptDataset.from_texts(TEXTS, tokenizer) if prompts is None else load_prompts(prompts, tokenizer)
    if isinstance(data, int):
        raise ValueError(f"--prompts needs a file or dataset with a column `prompt`, got the number {data}.")
    ids = [torch.as_tensor(row) for row in data.batch(range(min(ROWS, len(data)))).input_ids]
    samples = DecodeLoop(tokenizer)(
        trainer.model.pretrained_model, ids, SamplingConfig(max_new_tokens=max_new_tokens),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    diagnosis = trainer.diagnose(samples)
    paths = trainer.accelerator.unwrap_model(trainer.policy).paths
    in_force = ", ".join(name for name in COSTS if name not in paths.declined)
    declined = [f"declined: {name} ({reason}): {COSTS[name]}" for name, reason in paths.declined.items()]
    return [*str(diagnosis).splitlines(), f"fast paths: {in_force}", *declined], diagnosis.is_healthy
