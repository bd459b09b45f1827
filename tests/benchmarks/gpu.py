"""Ten minutes on one GPU: is it right, what does a decode step cost, what an update, what an iteration.

    python -m tests.benchmarks.gpu --seconds 540            # a 1B Llama of random weights
    python -m tests.benchmarks.gpu --tiny --output x.json   # all of it in small, on whatever device there is

Each cell is guarded and timed; it is printed and written as it ends, and finished cells are skipped: a run that is cut
off goes on where it was. Parity comes first, because speed of wrong results is worth nothing.
"""

import argparse
import copy
import gc
import json
import logging
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.kernels import liger_layers
from rlhf_ppo.kernels.liger_layers import use_liger_layers
from rlhf_ppo.kernels.triton_logprobs import choose_fold
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.make_sampler import SamplerName, make_sampler
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_tokenizer

GIB = 2**30
LARGE: dict[str, Any] = {
    "vocab_size": 128_256, "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 512, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([11] * 9)]
RESPONSES = [torch.tensor([8, 9, 10]), torch.tensor([11]), torch.tensor([12, 13, 14, 15, 16])]
GREEDY = SamplingConfig(max_new_tokens=12, stop_token_ids=tuple(range(0, VOCAB_SIZE, 9)), do_sample=False)


class Bench:
    """The cells of one device; each returns a dict of figures.

    Args:
        tiny: Use small shapes.
    """

    def __init__(self, *, tiny: bool) -> None:
        self.tiny, self.shape = tiny, TINY if tiny else LARGE
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")

    def cells(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All cells by name, in order."""
        cells: dict[str, Callable[[], dict[str, Any]]] = {"matrix products": self.products}
        for sampler in ("loop", "generate", "continuous"):
            cells[f"greedy, {sampler}"] = lambda sampler=sampler: self.greedy(sampler)
        for build in (tiny_gpt2, tiny_llama):
            cells[f"step, {build.__name__}"] = lambda build=build: self.parity(build)
            cells[f"step, {build.__name__}, plain head"] = lambda build=build: self.parity(build, fused_head=False)
        cells["float16 overflow"] = self.overflow
        cells["Triton kernels"] = lambda: self.with_kernels("", self.triton_kernels)
        for rows in (64, 512):
            for dtype in (torch.bfloat16, torch.float32):
                name = f"decode, loop, {rows} rows, {str(dtype).removeprefix('torch.')}"
                cells[name] = lambda rows=rows, dtype=dtype: self.decode("loop", dtype, rows)
        plain = DecodeLoop(static_step=False)
        cells["decode, loop without graphs, 64 rows, bfloat16"] = lambda: self.decode(plain, torch.bfloat16, 64)
        cells["update, auto"] = self.update
        cells["update, float32"] = lambda: self.update(precision="float32")
        for word in ("torch", "triton"):  # "auto" has both timed, and takes the faster
            cells[f"update, kernels of {word}"] = lambda word=word: self.with_kernels(word, self.update)
        cells["update, plain head"] = lambda: self.update(fused_head=False)
        cells["iteration"] = self.iteration
        cells["iteration, checkpointing"] = lambda: self.iteration(gradient_checkpointing=True)
        for sampler in ("generate", "generate-static", "continuous", "vllm-colocate"):
            cells[f"decode, {sampler}, 64 rows"] = lambda sampler=sampler: self.decode(sampler, torch.bfloat16, 64)
        return cells

    def llama(self, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        """A Llama of random weights, made on the device."""
        config = LlamaConfig(
            **self.shape, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        with self.device:
            torch.manual_seed(0)
            return LlamaForCausalLM(config).to(dtype).eval()

    def timed(self, function: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
        """Seconds of a call after a first one, and the allocator's peak in GiB."""
        function()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        if self.cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0
        return (time.perf_counter() - start) / repeats, peak

    def products(self) -> dict[str, Any]:
        """TFLOP/s of a large product in each precision: what the card can do."""
        size, found = 64 if self.tiny else 8192, {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a = torch.randn(size, size, device=self.device).to(dtype)
            seconds, _ = self.timed(lambda a=a: a @ a, repeats=3)
            found[str(dtype).removeprefix("torch.")] = round(2 * size**3 / seconds / 1e12, 2)
        return found

    def greedy(self, sampler: SamplerName) -> dict[str, Any]:
        """Whether a sampler draws the CPU's responses."""
        model = tiny_llama()
        expected = DecodeLoop()(copy.deepcopy(model), PROMPTS, GREEDY)
        found = make_sampler(sampler)(model.to(self.device), [prompt.to(self.device) for prompt in PROMPTS], GREEDY)
        return {"same": [row.tolist() for row in found.responses] == [row.tolist() for row in expected.responses]}

    def step(self, build: Callable[[], Any], *, cpu: bool, **settings: Any) -> tuple[torch.Tensor, PPOTrainer]:
        """One step of a tiny model; its weights afterwards."""
        AcceleratorState._reset_state(True)
        torch.manual_seed(0)
        kwargs = {**settings.pop("accelerator_kwargs", {}), "cpu": cpu}
        config = PPOConfig(
            batch_size=3, mini_batch_size=3, ppo_epochs=2, learning_rate=1e-3, accelerator_kwargs=kwargs, **settings
        )
        model = AutoModelForCausalLMWithValueHead.from_pretrained(build())
        trainer = PPOTrainer(config, model, tokenizer=tiny_tokenizer())
        assert trainer.current_device.type == ("cpu" if cpu else self.device.type)
        trainer.step(list(PROMPTS), list(RESPONSES), [torch.tensor(score) for score in (1.0, -1.0, 0.5)])
        return torch.cat([weight.detach().cpu().flatten() for weight in trainer.model.parameters()]), trainer

    def parity(self, build: Callable[[], Any], **settings: Any) -> dict[str, Any]:
        """How far a float32 step is from the CPU's, relative to the step."""
        torch.manual_seed(0)
        before = torch.cat(
            [w.detach().flatten() for w in AutoModelForCausalLMWithValueHead.from_pretrained(build()).parameters()]
        )
        cpu, _ = self.step(build, cpu=True, **settings)
        other, _ = self.step(build, cpu=not self.cuda, precision="float32", **settings)
        return {"apart_over_moved": float((other - cpu).norm() / (cpu - before).norm())}

    def overflow(self) -> dict[str, Any]:
        """Whether float16 survives a loss scale that is too high."""
        if not self.cuda:
            return {"skipped": "float16 with a loss scale needs a GPU"}
        kwargs = {"kwargs_handlers": [GradScalerKwargs(init_scale=2.0**40)]}
        _, trainer = self.step(tiny_llama, cpu=False, precision="fp16", diagnose=False, accelerator_kwargs=kwargs)
        scale = trainer.accelerator.scaler.get_scale()
        return {"scale": scale, "skipped_steps": trainer.metrics["ppo/updates_skipped"]}

    def decode(self, sampler: SamplerName | DecodeLoop, dtype: torch.dtype, rows: int) -> dict[str, Any]:
        """Milliseconds of a decode step and of the prefill."""
        model, steps = self.llama(dtype), 4 if self.tiny else 64
        prompts = [torch.arange(1, 129, device=self.device)] * (2 if self.tiny else rows)
        draw = make_sampler(sampler) if isinstance(sampler, str) else sampler
        seconds, peak = {}, 0.0
        for tokens in (1, steps):
            config = SamplingConfig(max_new_tokens=tokens)
            seconds[tokens], peak = self.timed(lambda config=config: draw(model, prompts, config))
        step = (seconds[steps] - seconds[1]) / (steps - 1)
        return {
            "ms_per_step": round(step * 1e3, 2), "prefill_ms": round(seconds[1] * 1e3, 1), "peak_gib": round(peak, 1),
            "tokens_per_s": round(len(prompts) / max(step, 1e-9)),
        }  # fmt: skip

    def trainer(self, rows: int, **settings: Any) -> PPOTrainer:
        config = PPOConfig(batch_size=rows, ppo_epochs=1, diagnose=False, **{"mini_batch_size": rows} | settings)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(self.llama())
        return PPOTrainer(config, model, tokenizer=tiny_tokenizer())

    def batch(self, rows: int, prompt: int, lengths: list[int]) -> tuple[list[torch.Tensor], ...]:
        """Random prompts and responses: nothing is sampled."""
        generator, vocab = torch.Generator().manual_seed(0), self.shape["vocab_size"]
        queries = list(torch.randint(1, vocab, (rows, prompt), generator=generator))
        responses = [torch.randint(1, vocab, (length,), generator=generator) for length in lengths]
        return queries, responses, [torch.tensor(float(row)) for row in range(rows)]

    def update(self, **settings: Any) -> dict[str, Any]:
        """A whole step of eight responses of unequal length: scoring and one epoch."""
        prompt, lengths = (8, [8, 2]) if self.tiny else (512, [512, 128])
        data = self.batch(8, prompt, lengths * 4)
        trainer = self.trainer(8, **settings)
        seconds, peak = self.timed(lambda: trainer.step(*data))
        tokens = 8 * prompt + 4 * sum(lengths)
        return {"seconds": round(seconds, 3), "peak_gib": round(peak, 1), "tokens_per_s": round(tokens / seconds)}

    def with_kernels(self, word: str, cell: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A cell under `RLHF_PPO_GPU_KERNELS`, with trials of its own."""
        with pytest.MonkeyPatch.context() as patches:
            patches.setenv("RLHF_PPO_GPU_KERNELS", word)
            patches.setattr(liger_layers, "_TRIALS", {})
            choose_fold.cache_clear()
            try:
                return cell()
            finally:
                choose_fold.cache_clear()

    def triton_kernels(self) -> dict[str, Any]:
        """What the trials of the LM head's and the layers' kernels find at these shapes."""
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        kernels = logging.getLogger("rlhf_ppo.kernels")
        before = kernels.level
        kernels.addHandler(handler)
        kernels.setLevel(logging.INFO)
        model = self.llama()
        choose_fold(model.device, self.shape["vocab_size"], torch.bfloat16)
        use_liger_layers(model, model.device, torch.bfloat16)
        kernels.removeHandler(handler)
        kernels.setLevel(before)
        return {"said": said or "Triton or liger-kernel is not installed"}

    def iteration(self, **settings: Any) -> dict[str, Any]:
        """Sampling and learning, phase by phase: 512 + 512 tokens a row, in passes that the trainer fits in memory."""
        rows, prompt, new = (4, 8, 8) if self.tiny else (64, 512, 512)
        queries, _, scores = self.batch(rows, prompt, [1] * rows)
        trainer = self.trainer(rows, **settings)
        on_device = [query.to(self.device) for query in queries]
        start = time.perf_counter()
        with trainer.precision.sampling(self.device):
            samples = DecodeLoop()(trainer.model, on_device, SamplingConfig(max_new_tokens=new))
        found = {"generate_s": round(time.perf_counter() - start, 2)}
        statistics = trainer.step(on_device, samples.responses, scores)
        for name in ("forward_pass", "optimize_step"):
            found[f"{name}_s"] = round(float(statistics[f"time/ppo/{name}"]), 2)
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 1) if self.cuda else 0.0
        return found | {"rows": rows, "pass_tokens": trainer._minibatch_config().token_budget}


def main(arguments: list[str] | None = None) -> None:
    """Run the cells that the file does not hold, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/gpu.json"))
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", help="beginnings of the names of cells")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    known = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    bench, start = Bench(tiny=options.tiny), time.monotonic()
    known.setdefault("device", torch.cuda.get_device_name() if bench.cuda else "CPU")
    known.setdefault("torch", torch.__version__)
    for name, cell in bench.cells().items():
        chosen = options.only is None or name.startswith(tuple(options.only))
        if name in known or not chosen or time.monotonic() - start > options.seconds:
            continue
        began = time.monotonic()
        try:
            known[name] = cell()
        except Exception as error:  # the other cells are worth having
            line = traceback.format_exc().strip().splitlines()[-3].strip()
            known[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}", "where": line}
        print(f"[{time.monotonic() - start:4.0f} s, +{time.monotonic() - began:.0f}] {name}: {json.dumps(known[name])}")
        options.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        AcceleratorState._reset_state(True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
