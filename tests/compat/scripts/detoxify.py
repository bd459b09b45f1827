"""Detoxification as TRL's example of 2023 has it: shared layers, Adam with a schedule of its own, bfloat16, the hub."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from trl.core import LengthSampler

model_name, toxicity_model_id, output_dir = sys.argv[1:]
config = PPOConfig(
    model_name=model_name,
    learning_rate=1e-3,
    log_with=None,
    ppo_epochs=2,
    mini_batch_size=2,
    batch_size=4,
    gradient_accumulation_steps=1,
    tracker_project_name="detoxify",
    use_score_scaling=True,
    use_score_norm=True,
    score_clip=1.5,
    ratio_threshold=20.0,
    whiten_rewards=True,
    kl_penalty="abs",
)


def build_dataset(config, input_min_text_length=5, input_max_text_length=10):
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token = tokenizer.eos_token
    ds = Dataset.from_list(
        [{"prompt": {"text": f"The movie was bad {n}", "toxicity": 0.1 * n}, "id": n} for n in range(12)]
    )

    def filter_fn(sample):
        toxicity = sample["prompt"]["toxicity"]
        return toxicity is not None and toxicity > 0.3

    ds = ds.filter(filter_fn, batched=False)
    input_size = LengthSampler(input_min_text_length, input_max_text_length)

    def tokenize(sample):
        prompt = sample["prompt"]["text"]
        sample["input_ids"] = tokenizer.encode(prompt)[: input_size()]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    ds = ds.map(tokenize, batched=False)
    ds.set_format(type="torch")
    return ds.train_test_split(test_size=0.1, shuffle=False)["train"]


min_input_length = 5
max_input_length = 10
dataset = build_dataset(config, input_min_text_length=min_input_length, input_max_text_length=max_input_length)


def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])


set_seed(config.seed)
model = AutoModelForCausalLM.from_pretrained(config.model_name, torch_dtype=torch.bfloat16)
model = AutoModelForCausalLMWithValueHead.from_pretrained(model)
ref_model = create_reference_model(model, num_shared_layers=1)
optimizer = Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=config.learning_rate)
lr_scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.5, total_iters=2)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
ppo_trainer = PPOTrainer(
    config,
    model,
    ref_model=ref_model,
    tokenizer=tokenizer,
    dataset=dataset,
    data_collator=collator,
    optimizer=optimizer,
    lr_scheduler=lr_scheduler,
)

toxicity_tokenizer = AutoTokenizer.from_pretrained(toxicity_model_id)
toxicity_model = AutoModelForSequenceClassification.from_pretrained(toxicity_model_id, torch_dtype=torch.float32).to(
    ppo_trainer.accelerator.device
)
generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
}
output_min_length = 4
output_max_length = 6
output_length_sampler = LengthSampler(output_min_length, output_max_length)
model_save_path = output_dir

history = []
for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    query_tensors = batch["input_ids"]
    response_tensors = []
    for query in query_tensors:
        gen_len = output_length_sampler()
        generation_kwargs["max_new_tokens"] = gen_len
        response = ppo_trainer.generate(query, **generation_kwargs)
        response_tensors.append(response.squeeze()[-gen_len:])
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
    texts = batch["response"]
    toxicity_inputs = toxicity_tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(
        ppo_trainer.accelerator.device
    )
    logits = toxicity_model(**toxicity_inputs).logits.float()
    toxicity_labels = (logits[:, 0]).tolist()
    rewards = [torch.tensor(output) for output in toxicity_labels]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    history.append({"kl": float(stats["objective/kl"]), "lr": float(stats["ppo/learning_rate"])})
    if epoch % 100 == 0:
        if ppo_trainer.accelerator.is_main_process:
            ppo_trainer.save_pretrained(model_save_path)
ppo_trainer.push_to_hub("someone/detoxified")
Path(output_dir, "history.json").write_text(json.dumps(history))
