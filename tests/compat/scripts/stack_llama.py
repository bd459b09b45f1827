"""Reinforcement learning as the StackLLaMA post of 2023 has it: flags for 8 bits, Adafactor, early stopping."""

import json
import os
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import Adafactor, AutoTokenizer, HfArgumentParser, pipeline
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler

tqdm.pandas()


@dataclass
class ScriptArguments:
    model_name: str | None = field(default="", metadata={"help": "the model name"})
    tokenizer_name: str | None = field(default="", metadata={"help": "the tokenizer name"})
    reward_model_name: str | None = field(default="", metadata={"help": "the reward model name"})
    log_with: str | None = field(default=None, metadata={"help": "use 'wandb' to log with wandb"})
    learning_rate: float | None = field(default=1.41e-5, metadata={"help": "the learning rate"})
    output_max_length: int | None = field(default=6, metadata={"help": "maximum length for generation"})
    mini_batch_size: int | None = field(default=2, metadata={"help": "the PPO minibatch size"})
    batch_size: int | None = field(default=4, metadata={"help": "the batch size"})
    ppo_epochs: int | None = field(default=2, metadata={"help": "the number of ppo epochs"})
    gradient_accumulation_steps: int | None = field(default=2, metadata={"help": "gradient accumulation steps"})
    adafactor: bool | None = field(default=True, metadata={"help": "whether to use the adafactor optimizer"})
    early_stopping: bool | None = field(default=True, metadata={"help": "whether to early stop"})
    target_kl: float | None = field(default=0.1, metadata={"help": "kl target for early stopping"})
    reward_baseline: float | None = field(default=0.0, metadata={"help": "subtracted from the reward"})
    batched_gen: bool | None = field(default=True, metadata={"help": "whether to use the batched text gen"})
    save_freq: int | None = field(default=1, metadata={"help": "n steps to save the model"})
    output_dir: str | None = field(default="runs/", metadata={"help": "where to save"})
    seed: int | None = field(default=0, metadata={"help": "the seed"})
    steps: int | None = field(default=20000, metadata={"help": "number of epochs"})
    init_kl_coef: float | None = field(default=0.2, metadata={"help": "Initial KL penalty coefficient"})
    adap_kl_ctrl: bool | None = field(default=True, metadata={"help": "Use adaptive KL control, otherwise linear"})
    load_in_8bit: bool | None = field(default=False, metadata={"help": "whether to load the model in 8bit"})


parser = HfArgumentParser(ScriptArguments)
script_args: ScriptArguments = parser.parse_args_into_dataclasses()[0]
config = PPOConfig(
    steps=script_args.steps,
    model_name=script_args.model_name,
    learning_rate=script_args.learning_rate,
    log_with=script_args.log_with,
    batch_size=script_args.batch_size,
    mini_batch_size=script_args.mini_batch_size,
    gradient_accumulation_steps=script_args.gradient_accumulation_steps,
    optimize_cuda_cache=True,
    early_stopping=script_args.early_stopping,
    target_kl=script_args.target_kl,
    ppo_epochs=script_args.ppo_epochs,
    seed=script_args.seed,
    init_kl_coef=script_args.init_kl_coef,
    adap_kl_ctrl=script_args.adap_kl_ctrl,
)

questions = ["How do I sort?", "What is a list?", "Why so slow", "Who wrote it?", "Where is it?"]
train_dataset = Dataset.from_dict({"question": questions, "id": list(range(5))})
original_columns = train_dataset.column_names
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 16, "truncation": True}

tokenizer = AutoTokenizer.from_pretrained(script_args.tokenizer_name)
if getattr(tokenizer, "pad_token", None) is None:
    tokenizer.pad_token = tokenizer.eos_token


def build_dataset(tokenizer, ds):
    num_proc = 1

    def preprocess_function(examples):
        new_examples = {"query": [], "input_ids": []}
        for question in examples["question"]:
            query = "Question: " + question + "\n\nAnswer: "
            tokenized_question = tokenizer(query, truncation=True)
            new_examples["query"].append(query)
            new_examples["input_ids"].append(tokenized_question["input_ids"])
        return new_examples

    ds = ds.map(preprocess_function, batched=True, num_proc=num_proc, remove_columns=original_columns)
    ds = ds.filter(lambda x: len(x["input_ids"]) < 512, batched=False, num_proc=num_proc)
    ds.set_format(type="torch")
    return ds


dataset = build_dataset(tokenizer, train_dataset)


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


set_seed(config.seed)
current_device = Accelerator().local_process_index
lora_config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    config.model_name,
    load_in_8bit=script_args.load_in_8bit,
    device_map={"": "cpu"},
    peft_config=lora_config,
)
optimizer = None
if script_args.adafactor:
    optimizer = Adafactor(
        filter(lambda p: p.requires_grad, model.parameters()),
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        lr=config.learning_rate,
    )
ppo_trainer = PPOTrainer(
    config,
    model,
    ref_model=None,
    tokenizer=tokenizer,
    dataset=dataset,
    data_collator=collator,
    optimizer=optimizer,
)
device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"
sentiment_pipe = pipeline("sentiment-analysis", model=script_args.reward_model_name, device=device, tokenizer=tokenizer)
generation_kwargs = {
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": 100_000,
}
output_length_sampler = LengthSampler(3, script_args.output_max_length)

history = []
for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    if epoch >= config.total_ppo_epochs:
        break
    question_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(
        question_tensors, return_prompt=False, length_sampler=output_length_sampler, **generation_kwargs
    )
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
    texts = [q + r for q, r in zip(batch["query"], batch["response"])]
    pipe_outputs = sentiment_pipe(texts, **sent_kwargs)
    rewards = [torch.tensor(output[0]["score"] - script_args.reward_baseline) for output in pipe_outputs]
    stats = ppo_trainer.step(question_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    history.append({"kl": float(stats["objective/kl"]), "lr": float(stats["ppo/learning_rate"])})
    if script_args.save_freq and epoch % script_args.save_freq == 0:
        ppo_trainer.save_pretrained(os.path.join(script_args.output_dir, f"step_{epoch}"))
with open(os.path.join(script_args.output_dir, "history.json"), "w") as f:
    json.dump(history, f)
