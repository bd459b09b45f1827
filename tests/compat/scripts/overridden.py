"""A trainer of one's own, as frameworks write it: overridden methods, private helpers, a config with a field more."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import PPODecorators, logprobs_from_logits
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.ppo_trainer import AdaptiveKLController


@dataclass
class LengthConfig(PPOConfig):
    length_penalty: float = 0.0


class LengthPenaltyTrainer(PPOTrainer):
    """Charges every action for its length, and keeps its own forward pass."""

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        rewards, non_score_rewards, kls = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
        return rewards - self.config.length_penalty * masks, non_score_rewards, kls

    @PPODecorators.empty_device_cache()
    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False, response_masks=None):
        bs, fbs = len(queries), self.config.mini_batch_size
        all_logprobs, all_logits, all_masks, all_values = [], [], [], []
        for i in range(math.ceil(bs / fbs)):
            input_kwargs = {key: value[i * fbs : (i + 1) * fbs] for key, value in model_inputs.items()}
            query_batch, response_batch = queries[i * fbs : (i + 1) * fbs], responses[i * fbs : (i + 1) * fbs]
            input_ids, attention_mask = input_kwargs["input_ids"], input_kwargs["attention_mask"]
            logits, _, values = model(**input_kwargs, return_dict=True, use_cache=False)
            logprobs = logprobs_from_logits(logits[:, :-1, :], input_ids[:, 1:])
            masks = torch.zeros_like(attention_mask)
            masks[:, :-1] = attention_mask[:, 1:]
            for j in range(len(query_batch)):
                start = len(query_batch[j]) - 1
                if attention_mask[j, 0] == 0:
                    start += attention_mask[j, :].nonzero()[0].item()
                end = start + len(response_batch[j])
                masks[j, :start] = 0
                masks[j, end:] = 0
            if return_logits:
                all_logits.append(logits)
            all_values.append(values)
            all_logprobs.append(logprobs)
            all_masks.append(masks)
        return (
            torch.cat(all_logprobs),
            torch.cat(all_logits)[:, :-1] if return_logits else None,
            torch.cat(all_values)[:, :-1],
            torch.cat(all_masks)[:, :-1],
        )


folder, output = sys.argv[1], Path(sys.argv[2])
config = LengthConfig(
    model_name=folder, batch_size=4, mini_batch_size=4, ppo_epochs=2, learning_rate=1e-4, length_penalty=0.1
)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
ppo_trainer = LengthPenaltyTrainer(config, model, None, tokenizer)
ppo_trainer.kl_ctl = AdaptiveKLController(0.1, config.target, config.horizon)
queries = [torch.tensor(tokenizer.encode(text)) for text in ("The movie was", "This film", "I did", "What a story")]
history = []
for _ in range(2):
    with unwrap_model_for_generation(ppo_trainer.model, ppo_trainer.accelerator) as unwrapped_model:
        unwrapped_model.eval()
    responses = [
        ppo_trainer.generate(query, return_prompt=False, do_sample=False, max_new_tokens=4).squeeze()
        for query in queries
    ]
    rewards = [torch.tensor(float(index)) for index in range(4)]
    stats = ppo_trainer.step(queries, responses, rewards)
    history.append({name: float(value) for name, value in stats.items() if getattr(value, "ndim", 0) == 0})
ppo_trainer.save_pretrained(str(output))
(output / "history.json").write_text(json.dumps(history))
