"""A sentiment script as the examples of TRL 0.7 to 0.11 have it: no line knows of another package."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, is_torch_npu_available, is_torch_xpu_available, pipeline
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from trl.core import LengthSampler

tqdm.pandas()


@dataclass
class ScriptArguments:
    judge: str = field(metadata={"help": "the classifier"})
    output_dir: str | None = field(default="out", metadata={"help": "where to save"})
    use_peft: bool = field(default=False, metadata={"help": "whether to use LoRA"})


parser = HfArgumentParser((ScriptArguments, PPOConfig))
args, ppo_config = parser.parse_args_into_dataclasses()
set_seed(ppo_config.seed)
tokenizer = AutoTokenizer.from_pretrained(ppo_config.model_name)
tokenizer.pad_token = tokenizer.eos_token


def build_dataset(config, input_min_text_length=2, input_max_text_length=8):
    texts = ["The movie was good", "This film was boring", "I liked this film", "What a terrible story"]
    dataset = Dataset.from_dict({"review": texts})
    input_size = LengthSampler(input_min_text_length, input_max_text_length)

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[: input_size()]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    dataset = dataset.map(tokenize, batched=False)
    dataset.set_format(type="torch")
    return dataset


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


if not args.use_peft:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(ppo_config.model_name)
    ref_model = create_reference_model(model)
else:
    from peft import LoraConfig

    peft_config = LoraConfig(r=4, lora_alpha=16, bias="none", task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(ppo_config.model_name, peft_config=peft_config)
    ref_model = None

ppo_trainer = PPOTrainer(
    ppo_config, model, ref_model, tokenizer, dataset=build_dataset(ppo_config), data_collator=collator
)
device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    if is_torch_xpu_available():
        device = "xpu:0"
    elif is_torch_npu_available():
        device = "npu:0"
    else:
        device = 0 if torch.cuda.is_available() else "cpu"
judge = pipeline("text-classification", model=args.judge, device=device)
sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 4}
generation_kwargs = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, "max_new_tokens": 6}

history = []
epochs = [batch for _epoch in range(2) for batch in ppo_trainer.dataloader]
for _step, batch in tqdm(enumerate(epochs)):
    query_tensors = batch["input_ids"]
    response_tensors, ref_response_tensors = ppo_trainer.generate(
        query_tensors, return_prompt=False, generate_ref_response=True, **generation_kwargs
    )
    batch["response"] = tokenizer.batch_decode(response_tensors)
    batch["ref_response"] = tokenizer.batch_decode(ref_response_tensors)
    texts = [q + r for q, r in zip(batch["query"], batch["response"])]
    outputs = judge(texts, **sent_kwargs)
    rewards = [torch.tensor(next(o["score"] for o in output if o["label"] == "LABEL_1")) for output in outputs]
    batch["ref_rewards"] = rewards
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "ref_response", "ref_rewards"])
    history.append({name: float(value) for name, value in stats.items() if getattr(value, "ndim", 0) == 0})

ppo_trainer.save_pretrained(args.output_dir)
Path(args.output_dir, "history.json").write_text(json.dumps(history))
