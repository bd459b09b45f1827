"""The model card of a saved policy: what it is and how to load it."""

from pathlib import Path


def write_model_card(folder: Path, name: str | None = None) -> None:
    """Write a model card, `README.md`, into a model folder.

    Args:
        folder: Made when missing.
        name: Title of the card; None: the name of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(_MODEL_CARD.format(name=name or folder.name), encoding="utf-8")


_MODEL_CARD = """---
library_name: transformers
tags: [rlhf, ppo, rlhf_ppo]
---

# {name}

A language model fine-tuned with rlhf_ppo: token-level PPO with a KL penalty towards a frozen reference.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

With its value head, to train on: `rlhf_ppo.AutoModelForCausalLMWithValueHead.from_pretrained(...)`.
"""
