"""Policy, reference and reward model on one base as TRL's example of 2023 has it, its settings nested for tyro."""

import json
import os
from dataclasses import dataclass, field

import tyro
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import LengthSampler


@dataclass
class ScriptArguments:
    rm_adapter: str
    out: str
    ppo_config: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            model_name="", learning_rate=1e-5, log_with=None, batch_size=8, mini_batch_size=2,
            gradient_accumulation_steps=2, optimize_device_cache=True, kl_penalty="kl", seed=0,
        )
    )  # fmt: skip
    peft_config: LoraConfig | None = field(
        default_factory=lambda: LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    )


args = tyro.cli(ScriptArguments)
config = args.ppo_config
tokenizer = AutoTokenizer.from_pretrained(config.model_name, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
input_size = LengthSampler(6, 12)


def tokenize(example):
    example["input_ids"] = tokenizer.encode(example["chosen"])[: input_size()]
    example["query"] = tokenizer.decode(example["input_ids"])
    return example


dataset = Dataset.from_dict({"chosen": ["Human: how was the film, tell me all about it please?"] * 9})
dataset = dataset.map(tokenize, batched=False)
dataset.set_format("torch")
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    config.model_name, device_map={"": "cpu"}, peft_config=args.peft_config, reward_adapter=args.rm_adapter
)


def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])


trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer, dataset=dataset, data_collator=collator)
generation_kwargs = {"top_k": 0.0, "top_p": 0.9, "do_sample": True, "pad_token_id": tokenizer.pad_token_id}
history = []
for batch in trainer.dataloader:
    questions = batch["input_ids"]
    responses = trainer.generate(questions, return_prompt=False, max_new_tokens=6, **generation_kwargs)
    batch["response"] = tokenizer.batch_decode(responses, skip_special_tokens=True)
    texts = [q + r for q, r in zip(batch["query"], batch["response"])]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(trainer.accelerator.device)
    raw_rewards = trainer.accelerator.unwrap_model(trainer.model).compute_reward_score(**inputs)
    rewards = [raw_rewards[i, -1, 1] for i in range(len(raw_rewards))]
    stats = trainer.step(questions, responses, rewards)
    trainer.log_stats(stats, batch, rewards)
    history.append({"kl": float(stats["objective/kl"]), "texts": texts, "rewards": [float(r) for r in rewards]})
trainer.save_pretrained(args.out)
with open(os.path.join(args.out, "history.json"), "w") as file:
    json.dump(history, file)
