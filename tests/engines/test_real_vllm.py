"""vLLM itself, on a CPU: what the stand-in cannot show. `make test-vllm` builds the environment and runs this.

Differences and seconds are printed: `make test-vllm ARGS=-s`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.vllm import VLLMSampler
from tests.engines.test_vllm_server import PROMPTS, largest_gap
from tests.support.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, tiny_tokenizer

pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.filterwarnings("default"),  # vLLM's and its dependencies' are not this project's
]
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}
CLOSE = 1e-4
DRAW = SamplingConfig(max_new_tokens=8, num_return_sequences=4, stop_token_ids=tuple(range(0, VOCAB_SIZE, 9)))
SECONDS_TO_START = 240


def save_llama(folder: Path, *, tied: bool) -> Path:
    """vLLM's attention on a CPU takes heads of 32, 64, 80 ... entries."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.1,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, scale: float = 1.0) -> Any:
    """The model of a folder, its weights multiplied."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    return model


def adapted(folder: Path) -> Any:
    """The same with an adapter that acts."""
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def report(what: str, gap: float, since: float) -> None:
    print(f"\n{what}: largest difference {gap:.1e} nats, {time.perf_counter() - since:.2f} s", flush=True)


def check_sampler(sampler: VLLMSampler, folder: Path) -> None:
    """Load, draw, equality; stale weights are seen; sync, equality again; an adapter arrives merged."""
    model = load(folder)
    for name, scale in {"as loaded": 1.0, "after an update": 1.1, "after another": 0.9}.items():
        start = time.perf_counter()
        sampler.sync_weights(model := load(folder, scale), Accelerator())
        samples = sampler(model, PROMPTS, DRAW)
        gap = largest_gap(model, samples)
        report(name, gap, start)
        assert gap < CLOSE
        assert samples.finished == [int(row[-1]) in DRAW.stops for row in samples.responses]
        assert len({tuple(row.tolist()) for row in samples.responses}) > 4
    assert largest_gap(load(folder, 1.1), samples) > 0.05  # weights of another moment are seen
    sampler.sync_weights(lora := adapted(folder), Accelerator())
    start = time.perf_counter()
    samples = sampler(lora, PROMPTS, DRAW)
    gap = largest_gap(lora.get_base_model(), samples)  # PEFT's layers are in it
    report("adapters, merged", gap, start)
    assert gap < CLOSE < largest_gap(load(folder), samples)


def check_settings(sampler: VLLMSampler, folder: Path) -> None:
    """Greedy responses are the own loop's; warped distributions are those of the settings; copies and lengths."""
    model = load(folder)
    sampler.sync_weights(model, Accelerator())
    greedy = replace(DRAW, do_sample=False, num_return_sequences=1, max_new_tokens=12)
    expected, found = (drawing(model, PROMPTS, greedy) for drawing in (DecodeLoop(), sampler))
    assert [row.tolist() for row in found.responses] == [row.tolist() for row in expected.responses]
    # Before the minimum length vLLM holds back the model's own end of the sequence, too, a stop token or not.
    stops = (EOS_TOKEN_ID, *DRAW.stops)
    warped = replace(DRAW, temperature=0.7, top_k=20, min_new_tokens=2, stop_token_ids=stops)
    samples = sampler(model, PROMPTS, warped)
    assert min(map(len, samples.responses)) >= 2
    assert samples.logprobs is not None
    for prompt, row, logprobs in zip(samples.prompts, samples.responses, samples.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, row])[None]).logits[0, len(prompt) - 1 : -1] / warped.temperature
        logits[:2, list(warped.stops)] = -torch.inf
        smallest = logits.topk(warped.top_k).values[:, -1:]
        truth = logits.masked_fill(logits < smallest, -torch.inf).log_softmax(-1).gather(1, row[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, truth, rtol=0, atol=CLOSE)


def check_training(sampler: VLLMSampler, folder: Path) -> None:
    """Three iterations of PPO: every ratio of the sampler is 1, so its weights are those of the moment."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(load(folder))
    config = PPOConfig(batch_size=8, mini_batch_size=8, learning_rate=3e-3)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)
    prompts = PromptDataset.from_texts(["The movie", "I liked"], tokenizer)
    sampling = SamplingConfig(max_new_tokens=6, num_return_sequences=4)
    state = trainer.train(
        lambda *, responses, **_: [float(len(text)) for text in responses],
        TrainConfig(iterations=3, sampling=sampling, progress=False), prompts=prompts, sampler=sampler,
    )  # fmt: skip
    assert [metrics["ppo/updates"] > 0 for metrics in state.history] == [True] * 3
    for metrics in state.history:
        assert metrics["sampler/logprob_difference"] < CLOSE
        assert metrics["sampler/ratio_max"] == pytest.approx(1.0, abs=10 * CLOSE)


@contextmanager
def serving(folder: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """A server of the folder's model, stopped at the end. `vllm serve` does not know the package vllm-cpu."""
    command = [
        sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128",
        "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1",
    ]  # fmt: skip
    log = (folder / "server.log").open("wb")
    server = subprocess.Popen(command, env=os.environ | SETTINGS, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield server
    finally:
        server.terminate()
        server.wait(60)
        log.close()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # a colocated engine sets them; they go when the test does
        monkeypatch.delenv(name)


def test_an_engine_in_this_process(tmp_path: Path) -> None:
    """With a tied head, of which vLLM's CPU layers keep a packed copy that a reload forgets."""
    folder, start = save_llama(tmp_path, tied=True), time.perf_counter()
    sampler = VLLMSampler(mode="colocate", tokenizer=tiny_tokenizer(), max_model_length=128)
    sampler.sync_weights(load(folder), Accelerator())
    report("engine opened", 0.0, start)
    for check in (check_sampler, check_settings, check_training):
        check(sampler, folder)


def test_a_server_that_reads_files(tmp_path: Path, free_port: int) -> None:
    folder, start = save_llama(tmp_path, tied=False), time.perf_counter()
    url = f"http://127.0.0.1:{free_port}"
    with serving(folder, free_port) as server:
        sampler = VLLMSampler(base_url=url, tokenizer=tiny_tokenizer(), timeout=SECONDS_TO_START)
        sampler.sync_weights(load(folder), Accelerator())
        report("server opened", 0.0, start)
        for check in (check_sampler, check_settings, check_training):
            check(sampler, folder)
        server.kill()
        server.wait()
        with pytest.raises(OSError, match=url):
            sampler(load(folder), PROMPTS, DRAW)


@pytest.mark.parametrize("name", ["vllm-colocate", "vllm-server"])
def test_the_recipe(tmp_path: Path, free_port: int, name: str) -> None:
    """One iteration of it, in a process of its own."""
    from tests.recipes.tiny_world import save_classic_classifier, write_reviews

    folder, start = save_llama(tmp_path / "policy", tied=name == "vllm-colocate"), time.perf_counter()
    arguments = {
        "model": folder, "reward-model": save_classic_classifier(tmp_path / "classifier"), "sampler": name,
        "dataset": write_reviews(tmp_path / "reviews.csv"), "output-dir": tmp_path / "run", "iterations": 1,
        "batch-size": 8, "mini-batch-size": 4, "new-tokens": 6, "eval-prompts": 4, "threads": 1, "log-with": "None",
        "lora-rank": 0,
    }  # fmt: skip
    if name == "vllm-server":
        arguments["vllm-url"] = f"http://127.0.0.1:{free_port}"
    flags = [word for flag, value in arguments.items() for word in (f"--{flag}", str(value))]
    recipe = Path(__file__).parents[2] / "recipes" / "ppo_gpt2_sentiment.py"
    with serving(folder, free_port) if name == "vllm-server" else nullcontext():
        command = [sys.executable, "-W", "ignore", str(recipe), *flags]
        run = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    report(f"recipe with {name}", 0.0, start)
    assert (tmp_path / "run" / "model" / "config.json").exists()
