"""A notebook of early 2023, cell by cell: one query at a time, `respond_to_batch`, then the best of n samples."""

# %%
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.core import LengthSampler, logprobs_from_logits, respond_to_batch, stats_to_np
from trl.extras import BestOfNSampler
from trl.import_utils import is_peft_available

tqdm.pandas()
name, judge, output_dir = sys.argv[1:]

# %%
model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
model_ref = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(name)
ppo_config = PPOConfig(batch_size=1, mini_batch_size=1)
ppo_trainer = PPOTrainer(ppo_config, model, model_ref, tokenizer)

# %%
query_tensor = tokenizer.encode("This morning I went to the ", return_tensors="pt")
response_tensor = respond_to_batch(model, query_tensor, txt_len=5)
reward = [torch.tensor(1.0)]
train_stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward)
stats = stats_to_np(train_stats)

# %%
with torch.no_grad():
    logits, _, values = model(torch.cat([query_tensor, response_tensor], dim=1))
logprobs = logprobs_from_logits(
    logits[:, :-1, :], query_tensor.new_tensor(torch.cat([query_tensor, response_tensor], dim=1)[:, 1:].tolist())
)

# %%
reward_pipe = pipeline("sentiment-analysis", model=judge, device=ppo_trainer.current_device)
sent_kwargs = {"top_k": None, "function_to_apply": "none"}


def queries_to_scores(list_of_strings):
    return [output[0]["score"] for output in reward_pipe(list_of_strings, **sent_kwargs)]


best_of_n = BestOfNSampler(
    model, tokenizer, queries_to_scores, length_sampler=LengthSampler(3, 6), sample_size=4, n_candidates=1, seed=0
)
queries = [torch.tensor(tokenizer.encode(text)) for text in ("The movie", "This film")]
best = best_of_n.generate(queries, do_sample=True, pad_token_id=tokenizer.eos_token_id)
game_data = {"query": tokenizer.batch_decode(queries), "best": [texts[0] for texts in best]}

# %%
history = {
    "kl": float(stats["objective/kl"]),
    "value": float(np.mean(stats["ppo/mean_scores"])),
    "logprobs": list(logprobs.shape),
    "values": list(values.shape),
    "best": game_data["best"],
    "peft": is_peft_available(),
}
model.save_pretrained(output_dir)
Path(output_dir, "history.json").write_text(json.dumps(history))
AutoModelForCausalLM.from_pretrained(output_dir)
