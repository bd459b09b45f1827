"""A tiny reward model, trained once for all tests that only look at one."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from reward_model import RewardModel, RewardModelConfig, train_reward_model
from reward_model.serving.config import ServeConfig
from reward_model.serving.server import application
from tests.support.patience import PATIENCE
from tests.support.tiny_models import EOS_TOKEN_ID, PAD_TOKEN_ID, tiny_gpt2, tiny_tokenizer

GOOD = ["good", "great", "lovely", "wonderful"]
BAD = ["bad", "boring", "terrible", "awful"]


def preference_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs that a tiny model can learn: kind words against unkind ones."""
    draw = random.Random(seed)
    words = lambda pool: " ".join(draw.choices(pool, k=draw.randint(1, 6)))
    return [{"prompt": "The movie was ", "chosen": words(GOOD), "rejected": words(BAD)} for _ in range(count)]


def tiny_config(base: Path, output: Path, **changes: Any) -> RewardModelConfig:
    """Seconds of training."""
    settings: dict[str, Any] = {
        "model": str(base),
        "output_dir": str(output),
        "learning_rate": 1e-3,
        "batch_size": 16,
        "max_length": 64,
        "progress": False,
    }
    return RewardModelConfig(**(settings | changes))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal LM folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that train_reward_model wrote."""
    rows = preference_rows(260)
    config = tiny_config(tiny_base, tmp_path_factory.mktemp("trained") / "reward_model")
    return train_reward_model(config, train=rows[:200], evaluation=rows[200:]).path


@pytest.fixture
def reward_model(trained_folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(trained_folder)


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[str]:
    """Address of a real server of `model` on a free loopback port."""
    uvicorn = pytest.importorskip("uvicorn")
    app = application(model, ServeConfig(model="-", **settings))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=PATIENCE)


def classifier(config: PreTrainedConfig, *, labels: int = 1, pad: int | None = PAD_TOKEN_ID) -> Any:
    """A random classifier with weights large enough for scores that differ."""
    config = type(config)(
        **(config.to_dict() | {"num_labels": labels, "pad_token_id": pad, "eos_token_id": EOS_TOKEN_ID})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.2)
    return model


def saved(model: Any, folder: Path, *, chat: bool = False) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder
