"""Tuning an encoder-decoder for sentiment as TRL's example of 2023 has it, with the settings of a long run."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, pipeline
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from trl.core import LengthSampler
from trl.trainer.ppo_trainer import PPODecorators

name, judge, output_dir = sys.argv[1:]
config = PPOConfig(
    model_name=name,
    learning_rate=5e-4,
    batch_size=4,
    mini_batch_size=2,
    backward_batch_size=1,
    ppo_epochs=1,
    target=1.0,
    horizon=100,
    kl_penalty="full",
    max_grad_norm=1.0,
    project_kwargs={"logging_dir": output_dir},
    is_peft_model=False,
    remove_unused_columns=False,
)
set_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(name)


def build_imdb_dataset(tokenizer, input_min_text_length=2, input_max_text_length=8):
    rows = {"text": [f"I liked the film {n}" for n in range(9)], "label": [n % 2 for n in range(9)]}
    dataset = Dataset.from_dict(rows)
    dataset = dataset.rename_columns({"text": "review"})
    dataset = dataset.filter(lambda x: len(x["review"]) > 5, batched=False)
    input_size = LengthSampler(input_min_text_length, input_max_text_length)

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[: input_size()] + [tokenizer.eos_token_id]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    dataset = dataset.map(tokenize, batched=False)
    dataset.set_format(type="torch")
    return dataset


def collater(data):
    return dict((key, [d[key] for d in data]) for key in data[0])


model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(name)
ref_model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(name)
ppo_trainer = PPOTrainer(
    config=config,
    model=model,
    ref_model=create_reference_model(ref_model),
    tokenizer=tokenizer,
    dataset=build_imdb_dataset(tokenizer),
    data_collator=collater,
)
generation_kwargs = {"top_k": 0.0, "top_p": 1.0, "do_sample": True, "eos_token_id": -1, "max_new_tokens": 6}
sentiment_pipe = pipeline("sentiment-analysis", judge, device=ppo_trainer.accelerator.device)


@PPODecorators.empty_device_cache()
def scores_of(texts):
    return [
        torch.tensor([output["score"] for output in outputs if output["label"] == "LABEL_1"][0])
        for outputs in sentiment_pipe(texts, top_k=None, function_to_apply="none")
    ]


history = []
for epoch in range(1):
    for step, batch in enumerate(ppo_trainer.dataloader):
        query_tensors = batch["input_ids"]
        model.gradient_checkpointing_disable()
        model.pretrained_model.config.use_cache = True
        response_tensors = ppo_trainer.generate(query_tensors, batch_size=2, remove_padding=True, **generation_kwargs)
        batch["response"] = tokenizer.batch_decode([r[1:] for r in response_tensors])
        model.gradient_checkpointing_enable()
        model.pretrained_model.config.use_cache = False
        rewards = scores_of([q + r for q, r in zip(batch["query"], batch["response"])])
        stats = ppo_trainer.step(query_tensors, [r[1:] for r in response_tensors], rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        history.append({"kl": float(stats["objective/kl"]), "label": batch["label"][0].item()})
ppo_trainer.accelerator.wait_for_everyone()
ppo_trainer.accelerator.unwrap_model(ppo_trainer.model).save_pretrained(output_dir)
tokenizer.save_pretrained(output_dir)
Path(output_dir, "history.json").write_text(json.dumps(history))
