"""Scripts written for TRL <= 0.11 run through `rlhf-ppo run` without a changed line, and give TRL 0.11.4's numbers.

`RECORDED` holds the statistics of the same scripts on the same folders under TRL 0.11.4 (transformers 4.46.3, the
environment of tests/benchmarks/classic_environment.sh): the scripts decode greedily and start from a saved value head.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2ForSequenceClassification

from rlhf_ppo import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOTrainer
from rlhf_ppo.cli import main
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer

SCRIPTS = Path(__file__).parent / "scripts"
RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "classic_scripts.json").read_text())
PPO = ["--batch_size", "4", "--mini_batch_size", "4", "--ppo_epochs", "2", "--learning_rate", "1e-4"]


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def save(wrapper: Any, folder: Path) -> str:
    """The folder of a policy with a value head that does not depend on the random state, and its tokenizer."""
    head = wrapper.v_head.summary
    head.weight.data = torch.linspace(-0.3, 0.3, head.weight.numel()).reshape(head.weight.shape)
    head.bias.data.zero_()
    wrapper.save_pretrained(folder)
    tiny_tokenizer(padding_side="right").save_pretrained(folder)  # on the left, TRL 0.11.4 was wrong
    return str(folder)


def policy_folder(folder: Path) -> str:
    return save(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()), folder)


def judge_folder(folder: Path) -> str:
    config = tiny_gpt2().config
    config.num_labels = 2
    judge = GPT2ForSequenceClassification(config)
    for index, parameter in enumerate(judge.parameters()):
        parameter.data = torch.linspace(-0.2, 0.2, parameter.numel()).sin().reshape(parameter.shape) * (1 + index % 3)
    judge.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def history(folder: Path) -> list[dict[str, float]]:
    steps: list[dict[str, float]] = json.loads((folder / "history.json").read_text())
    return steps


def run_sentiment(tmp_path: Path, *more: str) -> list[dict[str, float]]:
    policy, judge, out = policy_folder(tmp_path / "policy"), judge_folder(tmp_path / "judge"), tmp_path / "out"
    arguments = ["--model_name", policy, "--judge", judge, "--output_dir", str(out), *PPO, *more]
    assert main(["run", str(SCRIPTS / "sentiment.py"), *arguments]) == 0
    return history(out)


def assert_recorded(steps: list[dict[str, float]], script: str) -> None:
    for step, recorded in zip(steps, RECORDED[script], strict=True):
        for name, value in recorded.items():
            assert math.isclose(step[name], value, rel_tol=2e-3, abs_tol=2e-3), (name, step[name], value)


def test_a_sentiment_script_runs_unchanged(tmp_path: Path) -> None:
    """Two batches of four, with TRL's numbers; the policy that it saves has moved, and loads as a plain model."""
    steps = run_sentiment(tmp_path)
    assert_recorded(steps, "sentiment")
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("policy", "out"))
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)


@pytest.mark.slow
def test_a_sentiment_script_with_adapters_runs_unchanged(tmp_path: Path) -> None:
    """The adapter is saved; the reference is the policy with its adapters off: KL 0 at first."""
    steps = run_sentiment(tmp_path, "--use_peft")
    assert math.isclose(steps[0]["objective/kl"], 0.0, abs_tol=1e-5)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_script_with_overridden_methods_runs_unchanged(tmp_path: Path) -> None:
    """Its own rewards and its own forward pass are those that TRL learned from.

    Recorded is the first step, without its value loss: this forward pass leaves the value head's dropout on in TRL.
    """
    out = tmp_path / "out"
    assert main(["run", str(SCRIPTS / "overridden.py"), policy_folder(tmp_path / "policy"), str(out)]) == 0
    steps = history(out)
    assert len(steps) == 2
    assert_recorded(steps[:1], "overridden")


@pytest.mark.slow
def test_a_script_with_an_encoder_decoder_runs_unchanged(tmp_path: Path) -> None:
    """The doctor does not mind that its prompts end in the end-of-sequence token, as those of T5 do."""
    out = tmp_path / "out"
    folder = save(AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5()), tmp_path / "policy")
    assert main(["run", str(SCRIPTS / "t5.py"), folder, str(out)]) == 0
    steps = history(out)
    assert len(steps) == 2 and math.isclose(steps[0]["objective/kl"], 0.0, abs_tol=1e-5)


@pytest.mark.slow
def test_a_script_in_the_style_of_stack_llama_runs_unchanged(tmp_path: Path) -> None:
    """Its one batch of four is learned from, with its Adafactor; the adapter is saved at each step."""
    judge, out = judge_folder(tmp_path / "judge"), tmp_path / "out"
    policy = save(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama()), tmp_path / "policy")
    arguments = ["--model_name", policy, "--tokenizer_name", policy, "--reward_model_name", judge]
    assert main(["run", str(SCRIPTS / "stack_llama.py"), *arguments, "--output_dir", str(out)]) == 0
    (step,) = history(out)
    assert math.isclose(step["kl"], 0.0, abs_tol=1e-5) and step["lr"] == 1.41e-5
    assert (out / "step_0" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_script_in_the_style_of_the_detoxification_example_runs_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own schedule lowers the rate; what it pushes is the policy, and the name that it gave."""
    pushed: list[str] = []
    monkeypatch.setattr(PPOTrainer, "push_to_hub", lambda _, name, **__: pushed.append(name))
    policy, judge, out = policy_folder(tmp_path / "policy"), judge_folder(tmp_path / "judge"), tmp_path / "out"
    assert main(["run", str(SCRIPTS / "detoxify.py"), policy, judge, str(out)]) == 0
    first, second = history(out)
    assert math.isclose(first["kl"], 0.0, abs_tol=1e-5)
    assert first["lr"] == 1e-3 and second["lr"] == 0.75e-3  # half of the way to the half
    assert pushed == ["someone/detoxified"]


@pytest.mark.slow
def test_a_notebook_with_respond_to_batch_and_the_best_of_n_runs_unchanged(tmp_path: Path) -> None:
    policy, judge, out = policy_folder(tmp_path / "policy"), judge_folder(tmp_path / "judge"), tmp_path / "out"
    assert main(["run", str(SCRIPTS / "notebook.py"), policy, judge, str(out)]) == 0
    found: Any = history(out)
    assert math.isclose(found["kl"], 0.0, abs_tol=1e-5) and found["value"] == 1.0
    assert found["logprobs"][1] == found["values"][1] - 1
    assert len(found["best"]) == 2 and found["peft"]


@pytest.mark.slow
def test_a_script_that_tunes_flan_t5_runs_unchanged(tmp_path: Path) -> None:
    """Two batches of four of nine prompts, with checkpointing on for each step and off for each generation."""
    judge, out = judge_folder(tmp_path / "judge"), tmp_path / "out"
    policy = save(AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5()), tmp_path / "policy")
    assert main(["run", str(SCRIPTS / "flan_t5.py"), policy, judge, str(out)]) == 0
    steps = history(out)
    assert len(steps) == 2 and math.isclose(steps[0]["kl"], 0.0, abs_tol=1e-5)


@pytest.mark.slow
def test_a_loop_of_ones_own_with_a_trainers_parts_runs_unchanged(tmp_path: Path) -> None:
    """Its fixed coefficient stays, and its cosine schedule falls from step to step."""
    policy, out = policy_folder(tmp_path / "policy"), tmp_path / "out"
    assert main(["run", str(SCRIPTS / "loop_of_ones_own.py"), policy, str(out)]) == 0
    steps = history(out)
    assert len(steps) == 4 and {step["coefficient"] for step in steps} == {0.05}
    rates = [step["rate/now"] for step in steps]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    assert (out / "optimizer.pt").is_file() and (out / "README.md").is_file()


@pytest.mark.slow
def test_a_script_whose_reward_model_is_an_adapter_runs_unchanged(tmp_path: Path) -> None:
    """Its rewards are those of the classifier that the adapter was trained in."""
    policy, out = save(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama()), tmp_path / "policy"), tmp_path
    judge = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=2).eval()
    judge = get_peft_model(judge, LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)).eval()
    judge.save_pretrained(out / "judge")
    arguments = ["--rm-adapter", str(out / "judge"), "--out", str(out), "--ppo-config.model-name", policy]
    assert main(["run", str(SCRIPTS / "multi_adapter.py"), *arguments]) == 0
    steps: Any = history(out)
    (step,) = steps
    assert math.isclose(step["kl"], 0.0, abs_tol=1e-5)
    for text, reward in zip(step["texts"], step["rewards"], strict=True):
        row = tiny_tokenizer()(text, return_tensors="pt")
        assert math.isclose(judge(**row).logits[0, 1].item(), reward, abs_tol=1e-4)
