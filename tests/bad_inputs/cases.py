"""Named bad inputs: what a user might pass, and what the message says. The documented table is made of these."""

import math
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch

from reward_model.data.comparisons import parse_row
from reward_model.data.sources import read_rows
from reward_model.models.contract import Contract
from reward_model.serving.client import RemoteRewardModel, read_scores
from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.algorithms import GAE, GRPO, TRPO
from rlhf_ppo.diagnostics.guards import Guard, Guards
from rlhf_ppo.replay import replay
from rlhf_ppo.rewards.sources import RewardFailures, RewardRequest, score_batch
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

VOCABULARY, POSITIONS = 320, 16
SAMPLING = SamplingConfig(max_new_tokens=4)
ROWS = datasets.Dataset.from_dict({"prompt": ["a"]})
REQUEST = RewardRequest(prompts=["a", "b"], responses=["x", "y"], response_lengths=[1, 1])


@dataclass(frozen=True)
class Case:
    """One bad input."""

    area: str
    name: str
    call: Callable[[], object] = field(repr=False)
    error: type[Exception] = ValueError

    def message(self) -> str:
        """What the user reads, without paths of this machine."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.call()
            except self.error as error:
                return re.sub(r"(/[\w.-]+)+/(?=[\w.-]*)", "…/", str(error))
        raise AssertionError(f"{self.area}, {self.name}: was accepted")


@cache
def tokenizer() -> Any:
    return tiny_tokenizer()


@cache
def trainer() -> PPOTrainer:
    """A trainer for two rows of at most sixteen tokens."""
    model = tiny_gpt2(n_layer=1, n_embd=8, n_head=1, n_positions=POSITIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPOTrainer(
            PPOConfig(batch_size=2, mini_batch_size=2), AutoModelForCausalLMWithValueHead.from_pretrained(model),
            tokenizer=tokenizer(), dataset=PromptDataset.from_texts(["The", "I"], tokenizer()),
        )  # fmt: skip


def step(**change: Any) -> Callable[[], object]:
    """`step()` with a good batch but for the change; a tuple (row, value) changes one sample."""

    def call() -> object:
        good: dict[str, Any] = {
            "queries": [torch.tensor([5, 6]), torch.tensor([7])],
            "responses": [torch.tensor([8, 9]), torch.tensor([10])],
            "scores": [torch.tensor(1.0), torch.tensor(-1.0)],
        }  # fmt: skip
        if "response_masks" in change:
            good["response_masks"] = [torch.ones(2), torch.ones(1)]
        for name, value in change.items():
            if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int):
                good[name] = [*good[name][: value[0]], value[1], *good[name][value[0] + 1 :]]
            else:
                good[name] = value
        return trainer().step(**good)

    return call


def train(rewards: Any = None, **settings: Any) -> Callable[[], object]:
    """`train()` with good settings but for these."""

    def call() -> object:
        own = {name: settings.pop(name) for name in ("eval_prompts", "judges") if name in settings}
        config = TrainConfig(**{"sampling": SAMPLING, "iterations": 1, "progress": False, **settings})
        return trainer().train(rewards or (lambda responses: [1.0] * len(responses)), config, **own)

    return call


def prompts(values: list[Any], name: str = "prompt", **options: Any) -> Callable[[], object]:
    """A prompt dataset of one column."""
    return lambda: PromptDataset(datasets.Dataset.from_dict({name: values}), tokenizer(), **options)


def scores(answer: Any) -> Callable[[], object]:
    """A reward source that answers so."""
    return lambda: score_batch({"judge": lambda **_: answer}, REQUEST)


def file(name: str, content: bytes) -> Callable[[], object]:
    """A preference file with this content."""

    def call() -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            rows = [row for _, row in read_rows(str(path))]
            for row in rows:
                if isinstance(row, Exception):
                    raise row
            return rows

    return call


def contract(text: str) -> Callable[[], object]:
    """A reward model's folder with this contract."""

    def call() -> object:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "reward_model.json").write_text(text)
            return Contract.read(Path(folder))

    return call


T = torch.tensor
CASES = [
    Case("step()", "a tensor for the list of queries", step(queries=torch.ones(2, 3))),
    Case("step()", "a tuple of responses", step(responses=(T([8]),))),
    Case("step()", "one query too few", step(queries=[T([5])])),
    Case("step()", "no sample at all", step(queries=[], responses=[], scores=[])),
    Case("step()", "None for a query", step(queries=(1, None))),
    Case("step()", "a text for a response", step(responses=(0, "good"))),
    Case("step()", "a plain number for a score", step(scores=(0, 1.0))),
    Case("step()", "a query with batch dimension", step(queries=(0, T([[5, 6]])))),
    Case("step()", "a response of floats", step(responses=(0, T([8.0, 9.0])))),
    Case("step()", "a boolean response", step(responses=(0, T([True, False])))),
    Case("step()", "complex token ids", step(responses=(0, T([8 + 1j, 9])))),
    Case("step()", "an empty query", step(queries=(0, T([], dtype=torch.long)))),
    Case("step()", "an empty response", step(responses=(1, T([], dtype=torch.long)))),
    Case("step()", "a token beyond the vocabulary", step(responses=(0, T([8, 320])))),
    Case("step()", "padding of -100", step(queries=(1, T([7, -100])))),
    Case("step()", "a row beyond the positions", step(responses=(0, T([8] * 16)))),
    Case("step()", "a sparse response", step(responses=(0, T([0, 9]).to_sparse()))),
    Case("step()", "a response on the meta device", step(responses=(0, T([8, 9]).to("meta")))),
    Case("step()", "a score that is nan", step(scores=(1, T(math.nan)))),
    Case("step()", "a score that is infinite", step(scores=(0, T(math.inf)))),
    Case("step()", "a score beyond float32", step(scores=(0, T(1e300, dtype=torch.float64)))),
    Case("step()", "a score with two dimensions", step(scores=(0, T([[1.0]])))),
    Case("step()", "three scores for two tokens", step(scores=(0, T([1.0, 2.0, 3.0])))),
    Case("step()", "a mask of another length", step(response_masks=(0, torch.ones(3)))),
    Case("step()", "a mask without any action", step(response_masks=(1, torch.zeros(1)))),
    Case("step()", "a mask of weights", step(response_masks=(0, T([0.5, 1.0])))),
    Case("step()", "a mask with nan", step(response_masks=(0, T([math.nan, 1.0])))),
    Case("step()", "one mask for two samples", step(response_masks=[torch.ones(2)])),
    Case("PPOConfig", "a batch that does not divide", lambda: PPOConfig(batch_size=10, mini_batch_size=4)),
    Case("PPOConfig", "a batch size of zero", lambda: PPOConfig(batch_size=0)),
    Case(
        "PPOConfig", "a batch size in words",
        lambda: PPOConfig(batch_size="many"), TypeError,
    ),  # type: ignore[arg-type]
    Case("PPOConfig", "a learning rate that is nan", lambda: PPOConfig(learning_rate=math.nan)),
    Case("PPOConfig", "a negative learning rate", lambda: PPOConfig(learning_rate=-1e-5)),
    Case("PPOConfig", "a temperature of zero", lambda: PPOConfig(temperature=0.0)),
    Case("PPOConfig", "an unknown KL penalty", lambda: PPOConfig(kl_penalty="k4")),  # type: ignore[arg-type]
    Case("PPOConfig", "a negative seed", lambda: PPOConfig(seed=-1)),
    Case("PPOConfig", "JSON that is none", lambda: PPOConfig(tracker_kwargs="{name: x}")),
    Case("PPOConfig", "JSON of a list", lambda: PPOConfig(tracker_kwargs="[1]")),
    Case("PPOConfig", "a misspelt setting", lambda: setattr(PPOConfig(), "batchsize", 4), AttributeError),
    Case("algorithms", "a discount above one", lambda: GAE(gamma=1.5)),
    Case("algorithms", "a trust region without size", lambda: TRPO(max_kl=0.0)),
    Case("algorithms", "a trust region in words", lambda: TRPO(max_kl="small"), TypeError),  # type: ignore[arg-type]
    Case("sampling", "no new token", lambda: SamplingConfig(max_new_tokens=0)),
    Case("sampling", "a minimum above the maximum", lambda: SamplingConfig(max_new_tokens=4, min_new_tokens=5)),
    Case("sampling", "top-p of zero", lambda: SamplingConfig(max_new_tokens=4, top_p=0.0)),
    Case("sampling", "an empty stop string", lambda: SamplingConfig(max_new_tokens=4, stop_strings=("",))),
    Case(
        "sampling", "a float for a number of tokens",
        lambda: SamplingConfig(max_new_tokens=4.5), TypeError,
    ),  # type: ignore[arg-type]
    Case(
        "train()", "another temperature than the trainer's",
        train(sampling=SamplingConfig(max_new_tokens=4, temperature=0.7)),
    ),
    Case("train()", "responses beyond the positions", train(sampling=SamplingConfig(max_new_tokens=16))),
    Case(
        "train()", "a stop token beyond the vocabulary",
        train(sampling=SamplingConfig(max_new_tokens=4, stop_token_ids=(999,))),
    ),
    Case("train()", "evaluations without held-out prompts", train(eval_every=1)),
    Case("train()", "a judge guard without judges", train(guards=Guards(judge=Guard(limit=1.0)))),
    Case("train()", "the best of no evaluation", train(keep_best="score")),
    Case(
        "train()", "a guard that protects a best model, and none is kept",
        train(guards=Guards(kl=Guard(limit=9.0, action="keep_best"))),
    ),
    Case("train()", "no memory of any iteration", train(keep_history=0)),
    Case("train()", "no iteration", train(iterations=0)),
    Case("train()", "a time limit of zero", train(max_time=0.0)),
    Case("train()", "a reward that is no function", train(rewards={"judge": 3}), TypeError),
    Case(
        "train()", "groups that do not divide the batch",
        train(sampling=SamplingConfig(max_new_tokens=4, num_return_sequences=3)),
    ),
    Case("guards", "a length factor of one", lambda: Guards(length=Guard(limit=1.0))),
    Case("guards", "no patience", lambda: Guard(limit=1.0, patience=0)),
    Case("guards", "an unknown action", lambda: Guard(limit=1.0, action="hope")),  # type: ignore[arg-type]
    Case("prompts", "no such column", prompts(["a"], column="text")),
    Case("prompts", "a column that reward sources are called with", prompts(["a"], name="responses")),
    Case("prompts", "no row", prompts([])),
    Case("prompts", "nothing but empty texts", prompts(["", ""])),
    Case("prompts", "numbers for texts", prompts([1.5, 2.5]), TypeError),
    Case("prompts", "a missing text", prompts(["a", None]), TypeError),
    Case("prompts", "tokens beyond the vocabulary", prompts([[5, 999]])),
    Case("prompts", "conversations without a template", prompts([[{"role": "user", "content": "Hi"}]])),
    Case("prompts", "a limit of no token", prompts(["a"], max_prompt_tokens=0)),
    Case("prompts", "an unknown rule for long prompts", prompts(["a"], truncation="middle")),
    Case(
        "prompts", "all splits at once",
        lambda: PromptDataset(datasets.DatasetDict(train=ROWS, test=ROWS), tokenizer()), TypeError,
    ),  # type: ignore[arg-type]
    Case("reward sources", "one score for two samples", scores([1.0])),
    Case("reward sources", "nan", scores([1.0, math.nan])),
    Case("reward sources", "a text for a score", scores([1.0, "good"]), TypeError),
    Case("reward sources", "a number for the list", scores(1.0), TypeError),
    Case("reward sources", "two token scores for one token", scores([1.0, [1.0, 2.0]])),
    Case("reward sources", "an exception", lambda: score_batch({"judge": lambda **_: 1 / 0}, REQUEST), RuntimeError),
    Case(
        "reward sources", "an argument that is no column",
        lambda: score_batch({"judge": lambda completions: [1.0]}, REQUEST), TypeError,
    ),
    Case(
        "reward sources", "a weight that is nan",
        lambda: score_batch({"judge": (lambda **_: [1.0, 1.0], math.nan)}, REQUEST),
    ),
    Case("reward sources", "no attempt", lambda: RewardFailures(attempts=0)),
    Case("reward server", "an address without scheme", lambda: RemoteRewardModel("localhost:8018")),
    Case("reward server", "an answer in HTML", lambda: read_scores("<html>", 1, "http://there")),
    Case("reward server", "a null among the scores", lambda: read_scores('{"scores": [null]}', 1, "http://there")),
    Case("preference data", "a pair without a rejected text", lambda: parse_row({"chosen": "a"}, "row 3")),
    Case("preference data", "the same text twice", lambda: parse_row({"chosen": "a", "rejected": "a"}, "row 3")),
    Case(
        "preference data", "a probability of two",
        lambda: parse_row({"chosen": "a", "rejected": "b", "preference": 2.0}, "row 3"),
    ),
    Case("preference data", "a binary file", file("data.jsonl", b"\x89PNG\r\n\x1a\n")),
    Case("preference data", "a line cut off", file("data.jsonl", b'{"chosen": "a", ')),
    Case("preference data", "an unknown kind of file", file("data.xml", b"<a/>")),
    Case("reward model", "a contract that is no JSON", contract("{")),
    Case("reward model", "a contract of another version", contract('{"format_version": 99}')),
    Case("replay", "a folder that is no dump", lambda: replay("/nowhere")),
    Case(
        "step()", "no groups for an algorithm that compares them",
        lambda: _grouped().step([T([5])] * 2, [T([8])] * 2, [T(1.0)] * 2),
    ),
    Case(
        "step()", "a group of two prompts",
        lambda: _grouped().step([T([5]), T([6])], [T([8])] * 2, [T(1.0)] * 2, group_size=2),
    ),
    Case(
        "step()", "three flags of truncation for two samples",
        lambda: _grouped().step([T([5])] * 2, [T([8])] * 2, [T(1.0)] * 2, group_size=2, truncated=[True] * 3),
    ),
    Case("PPOConfig", "a weight for a KL that is not measured", lambda: PPOConfig(kl_penalty="none")),
]  # fmt: skip


@cache
def _grouped() -> PPOTrainer:
    model = tiny_gpt2(n_layer=1, n_embd=8, n_head=1, n_positions=POSITIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPOTrainer(
            PPOConfig(batch_size=2, mini_batch_size=2), AutoModelForCausalLMWithValueHead.from_pretrained(model),
            tokenizer=tokenizer(), algorithm=GRPO(),
        )  # fmt: skip
