"""An encoder-decoder, as TRL's T5 example has it."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, set_seed

folder, output = sys.argv[1], Path(sys.argv[2])
config = PPOConfig(model_name=folder, batch_size=4, mini_batch_size=4, learning_rate=1e-4, remove_unused_columns=False)
set_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(folder)
ref_model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(folder)
texts = ["The movie was good", "This film was boring", "I liked this film", "What a terrible story"] * 2
tokens = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
dataset = Dataset.from_dict({"query": texts, "input_ids": tokens})
dataset.set_format(type="torch", columns=["input_ids"], output_all_columns=True)
ppo_trainer = PPOTrainer(
    config,
    model,
    ref_model,
    tokenizer,
    dataset=dataset,
    data_collator=lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
)
history = []
for batch in ppo_trainer.dataloader:
    query_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(query_tensors, do_sample=False, max_new_tokens=6)
    batch["response"] = tokenizer.batch_decode([response[1:] for response in response_tensors])
    rewards = [torch.tensor(len(text) / 10) for text in batch["response"]]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    history.append({name: float(value) for name, value in stats.items() if getattr(value, "ndim", 0) == 0})
ppo_trainer.save_pretrained(str(output))
(output / "history.json").write_text(json.dumps(history))
