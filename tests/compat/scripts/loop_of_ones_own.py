"""A loop of one's own, as posts on dialogue agents of 2023 have it: a trainer's parts used one by one."""

import json
import os
import sys

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DataCollatorWithPadding, GenerationConfig
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler, flatten_dict, masked_mean, whiten
from trl.models import create_reference_model
from trl.trainer import AdaptiveKLController, FixedKLController, RunningMoments

name, output_dir = sys.argv[1:]
set_seed(42)
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token_id = tokenizer.eos_token_id
texts = [f"### Human: film number {n} ### Assistant:" for n in range(8)]
dataset = Dataset.from_dict({"query": texts}).map(lambda row: {"input_ids": tokenizer(row["query"])["input_ids"]})
dataset = dataset.remove_columns("query")

policy = AutoModelForCausalLMWithValueHead.from_pretrained(
    name, v_head_init_strategy="normal", v_head_initializer_range=0.1, summary_dropout_prob=0.0
)
config = PPOConfig(
    exp_name="dialogue", task_name=None, model_name=name, query_dataset="someone/films", reward_model="length",
    batch_size=4, mini_batch_size=1, gradient_accumulation_steps=4, ppo_epochs=1, learning_rate=1e-4,
    adap_kl_ctrl=False, init_kl_coef=0.05, gamma=0.99, lam=0.9, cliprange=0.1, cliprange_value=0.1, vf_coef=0.2,
    early_stopping=False, compare_steps=1, seed=1, push_to_hub_if_best_kwargs={},
)  # fmt: skip
optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.01)
trainer = PPOTrainer(
    config=config,
    model=policy,
    ref_model=create_reference_model(policy),
    tokenizer=tokenizer,
    dataset=dataset,
    data_collator=DataCollatorWithPadding(tokenizer),
    optimizer=optimizer,
    lr_scheduler=CosineAnnealingLR(optimizer, T_max=10),
    num_shared_layers=None,
)
assert isinstance(trainer.kl_ctl, FixedKLController) and not isinstance(trainer.kl_ctl, AdaptiveKLController)
moments = RunningMoments(trainer.accelerator)
sampler = LengthSampler(3, 7)
generation_config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.eos_token_id)

history, best = [], -1e9
for epoch in range(2):
    bar = tqdm(trainer.dataloader, disable=not trainer.accelerator.is_local_main_process)
    for batch in bar:
        ids, mask = batch["input_ids"].to(trainer.current_device), batch["attention_mask"].bool()
        queries = [row[keep] for row, keep in zip(ids, mask)]
        trainer.model.eval()
        responses = trainer.generate(
            queries, return_prompt=False, length_sampler=sampler, generation_config=generation_config
        )
        trainer.model.train()
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = torch.tensor([len(text) / 10 for text in texts])
        mean, std = moments.update(scores)
        scores = whiten(scores, shift_mean=False) if len(set(scores.tolist())) > 1 else scores
        stats = trainer.step(queries, responses, list(scores))
        trainer.log_stats(stats, {"query": tokenizer.batch_decode(queries), "response": texts}, list(scores))
        mean_score = masked_mean(scores, torch.ones_like(scores)).item()
        bar.set_postfix(kl=trainer.kl_ctl.value, reward=mean_score)
        history.append({"kl": float(stats["objective/kl"]), "coefficient": trainer.kl_ctl.value, "mean": float(mean)})
        history[-1] |= flatten_dict({"rate": {"now": trainer.lr_scheduler.get_last_lr()[0]}})
        if mean_score > best:
            best = mean_score
            trainer._save_pretrained(output_dir)
torch.save(trainer.optimizer.state_dict(), os.path.join(output_dir, "optimizer.pt"))
trainer.create_model_card(output_dir, model_name="dialogue")
with open(os.path.join(output_dir, "history.json"), "w") as file:
    json.dump(history, file)
