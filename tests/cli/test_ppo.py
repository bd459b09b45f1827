"""`rlhf-ppo ppo`: settings from file and flags, refusals in a line, and runs that leave a model and a report."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from reward_model.data.prompts import read_prompts
from rlhf_ppo import GRPO, AutoModelForCausalLMWithValueHead, PPOClip, SeparateCritic
from rlhf_ppo.algorithms import GAE, TopEntropyTokens
from rlhf_ppo.cli.ppo import main, parse
from rlhf_ppo.cli.ppo_run import load_prompts, make_configs, make_trainer
from rlhf_ppo.cli.run_config import RunConfig
from rlhf_ppo.diagnostics.guards import Guard, Guards
from rlhf_ppo.loop.dynamic_sampling import DynamicSampling
from rlhf_ppo.presets import PRESETS, published_run
from rlhf_ppo.report import RunFolder
from rlhf_ppo.rollout.collect import SoftOverlong
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.recipes.tiny_world import save_gpt2, save_reward_model

SMALL = [
    "--ppo.batch_size=4", "--ppo.mini_batch_size", "2", "--train.iterations", "2", "--train.progress=false",
    "--sampling.max_new_tokens", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts and a reward function on disk."""
    folder = tmp_path_factory.mktemp("cli")
    save_gpt2(folder / "gpt2")
    texts = ["The film", "A story", "It was", "My friend"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (folder / "rewards.py").write_text(
        "def length(prompts, responses, **_):\n    return [float(len(r)) for r in responses]\n"
    )
    return folder


def options(world: Path, run: Path) -> list[str]:
    """Model, prompts, run folder and sizes."""
    return [
        "--model", str(world / "gpt2"), "--prompts", str(world / "prompts.jsonl"), "--output-dir", str(run), *SMALL
    ]  # fmt: skip


def test_a_run_by_flags_leaves_metrics_model_and_report(world: Path, tmp_path: Path, capsys: Any) -> None:
    served = ["--live-address", "127.0.0.1:0"]
    status = main([*options(world, tmp_path / "run"), *served, "--reward", f"{world / 'rewards.py'}:length"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "live report: http://127.0.0.1:" in said.out and "2 iterations of training: mean score" in said.out
    assert f"report: {tmp_path / 'run' / 'report.html'}" in said.out
    settings = RunFolder.open(tmp_path / "run").config()
    assert settings["model"] == str(world / "gpt2") and settings["ppo"]["batch_size"] == 4
    assert settings["algorithm_config"]["gae"]["lam"] == 0.95
    assert len(RunFolder.open(tmp_path / "run").metrics()) == 2
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "run" / "model"))


def test_a_finished_run_says_that_it_trained_nothing_and_keeps_its_settings(
    world: Path, tmp_path: Path, capsys: Any
) -> None:
    run = [*options(world, tmp_path / "run"), "--reward", f"{world / 'rewards.py'}:length"]
    assert main([*run, "--train.iterations", "1"]) == 0
    capsys.readouterr()
    assert main([*run, "--train.iterations", "1", "--train.keep_last", "7"]) == 0
    said = capsys.readouterr()
    assert "Nothing was trained" in said.err and "another --output-dir" in said.err
    assert "mean score" not in said.out and "report: " in said.out
    assert RunFolder.open(tmp_path / "run").config()["train"]["keep_last"] != 7


@pytest.mark.slow
def test_a_reward_models_folder_is_a_reward(world: Path, tmp_path: Path) -> None:
    save_reward_model(tmp_path / "rm", world / "gpt2")
    assert main([*options(world, tmp_path / "run"), "--reward", str(tmp_path / "rm")]) == 0


def test_a_flag_overrides_the_file_and_what_is_printed_is_read_again(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: mine\nlora_rank: 8\nppo: {learning_rate: 3.0e-6, batch_size: 8}\n")
    assert main([str(file), "--lora-rank", "4", "--ppo.learning-rate", "1e-5", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"], printed["lora_rank"]) == ("mine", 4)
    assert printed["ppo"] == {"learning_rate": 1e-5, "batch_size": 8}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(printed))
    assert parse([str(tmp_path / "again.yaml")])[0] == RunConfig(**printed)


def test_a_preset_gives_way_to_settings() -> None:
    ppo, train, algorithm = make_configs(RunConfig(preset="trl-classic", ppo={"ppo_epochs": 1}))
    assert ppo.ppo_epochs == 1 and ppo.learning_rate == 1.41e-5 and isinstance(algorithm, PPOClip)
    _, train, algorithm = make_configs(RunConfig(algorithm="grpo", algorithm_config={"clip_high": 0.3}))
    assert isinstance(algorithm, GRPO) and algorithm.clip_high == 0.3
    assert train.sampling.num_return_sequences == 8
    assert make_configs(RunConfig(train={"iterations": 100}))[1].save_every == 4
    assert make_configs(RunConfig(train={"iterations": 100, "save_every": 0}))[1].save_every == 0


def test_classic_fields_sections_and_lists_reach_their_configurations(tmp_path: Path) -> None:
    """`ppo.lam` and the like were ignored, and no file or flag could set a nested configuration or a tuple."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "ppo: {cliprange: 0.05, lam: 0.8}\nsampling: {stop_strings: ['!'], stop_token_ids: [3]}\n"
        "train: {guards: {kl: {limit: 10}}}\nalgorithm_config: {tokens: {type: TopEntropyTokens, share: 0.3}}\n"
    )
    nested = ["--train.guards.kl.patience=2", "--algorithm_config.gae.value-lam", "1"]
    _, train, algorithm = make_configs(parse([str(file), *nested])[0])
    assert train.guards == Guards(kl=Guard(limit=10, patience=2))
    assert (train.sampling.stop_strings, train.sampling.stop_token_ids) == (("!",), (3,))
    assert algorithm == PPOClip(
        clip_low=0.05, clip_high=0.05, gae=GAE(lam=0.8, value_lam=1), tokens=TopEntropyTokens(share=0.3)
    )  # fmt: skip


def test_a_preset_brings_its_loop_and_its_algorithm_whose_fields_may_be_set() -> None:
    """Dynamic sampling and the penalty of long responses were left out, and fields checked against PPO-Clip's."""
    settings = RunConfig(preset="dapo", algorithm_config={"sequence_mean": True}, sampling={"max_new_tokens": 100})
    _, train, algorithm = make_configs(settings)
    assert train.dynamic_sampling == DynamicSampling() and train.overlong == SoftOverlong(buffer=20)
    assert algorithm == GRPO(clip_high=0.28, sequence_mean=True)
    assert make_configs(RunConfig(preset="dapo", train={"overlong": None}))[1].overlong is None
    assert make_configs(RunConfig(preset="ziegler2019", ppo={"steps": 5120}))[1].iterations == 10
    assert make_configs(RunConfig(preset="sao", sampler="continuous"))[0].importance_sampling_cap is None


@pytest.mark.parametrize(("preset", "is_annealed"), [("nplus2024", True), ("sao", False)])
def test_a_preset_brings_its_critic_and_its_schedule(
    world: Path, preset: str, is_annealed: bool, capsys: Any
) -> None:  # fmt: skip
    """The value head was trained in place of the critic, at a constant rate, and `sao` failed."""
    settings = RunConfig(model=str(world / "gpt2"), preset=preset, train={"iterations": 4})
    ppo, train, algorithm = make_configs(settings)
    trainer = make_trainer(settings, ppo, train, algorithm, AutoTokenizer.from_pretrained(world / "gpt2"))
    assert isinstance(trainer.model.critic, SeparateCritic)
    assert (trainer.lr_scheduler is not None) is is_annealed
    assert capsys.readouterr().err.endswith(f"preset {preset}: {published_run(preset).remarks}\n")


def test_the_critic_of_an_annealed_preset_may_have_its_own_rate(world: Path) -> None:
    """It was refused for an optimizer that nobody had passed."""
    critic = {"critic": {"learning_rate": 1e-3}}
    settings = RunConfig(
        model=str(world / "gpt2"), preset="nplus2024", train={"iterations": 4}, algorithm_config=critic
    )
    ppo, train, algorithm = make_configs(settings)
    trainer = make_trainer(settings, ppo, train, algorithm, AutoTokenizer.from_pretrained(world / "gpt2"))
    assert trainer.lr_scheduler.get_last_lr() == [ppo.learning_rate, 1e-3]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(world: Path, preset: str, tmp_path: Path) -> None:
    sizes = ["--ppo.batch_size=8", "--ppo.mini_batch_size", "4", "--sampling.num_return_sequences", "4"]
    run = [*options(world, tmp_path / "run"), "--preset", preset, "--reward", f"{world / 'rewards.py'}:length"]
    assert main([*run, *sizes]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "dapo", "algorithm": "ppo-clip"}, "the preset dapo brings its own algorithm, got ppo-clip"),
        ({"preset": "nplus2024", "algorithm": "grpo"}, "the preset nplus2024 brings its own algorithm, got grpo"),
        ({"preset": "orz", "ppo": {"lam": 0.9}}, "`ppo.lam` is read by ppo-clip alone, not by orz"),
        ({"algorithm": "grpo", "ppo": {"ent_coef": 0.1}}, "`ppo.ent_coef` is read by ppo-clip alone, not by grpo"),
        ({"algorithm_config": {"gae": {"lamda": 1}}}, "no field of `algorithm_config.gae` 'lamda' .did you mean 'lam'"),
        ({"algorithm_config": {"tokens": {}}}, "`algorithm_config.tokens` needs `type`, one of TopEntropyTokens, Clip"),
        ({"train": {"output_dir": "x"}}, "`train.output_dir` is the setting `output_dir` here"),
    ],
)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_configs(RunConfig(**settings))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--ppo.learning_rat", "1"], 1, "there is no field of `ppo` 'learning_rat' (did you mean 'learning_rate'?)"),
        (["--algorithm", "rlooo"], 1, "there is no algorithm 'rlooo' (did you mean 'rloo'?)"),
        (["--sampler", "vlm"], 1, "there is no sampler 'vlm'"),
        (["--ppo.batch_size"], 2, "--ppo.batch_size needs a value"),
        (["missing.yaml"], 2, "there is no file missing.yaml"),
        (["--train.guards.kl", "3", "--train.guards.kl.limit", "4"], 2, "needs fields in train.guards.kl"),
        (["--prompts", "p.jsonl", "--reward", "nowhere:it"], 1, "There is no file p.jsonl"),
        ([], 1, "--prompts is missing"),
        (["--model", "/no/such/folder"], 1, "there is no model folder /no/such/folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(world: Path, arguments: list[str], status: int, message: str, capsys: Any) -> None:
    assert main(["--model", str(world / "gpt2"), *arguments]) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: [a, b]", "RunConfig.prompts must be a text, got ['a', 'b']"),
        ("lora_rank: '8'", "RunConfig.lora_rank must be a whole number, got '8'"),
        ("live: maybe", "RunConfig.live must be True or False, got 'maybe'"),
        ("ppo: 5", "RunConfig.ppo must be dict, got 5"),
    ],
)
def test_a_setting_of_another_type_is_one_line(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    """They ended in tracebacks, or in Python's own words."""
    (tmp_path / "run.yaml").write_text(f"{text}\n")
    assert main([str(tmp_path / "run.yaml"), "--print-config"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_file_may_give_numbers_without_a_point_episodes_and_empty_sections(tmp_path: Path) -> None:
    """PyYAML reads 1e-5 as a text."""
    (tmp_path / "run.yaml").write_text("prompts: 12\nppo: {learning_rate: 1e-5}\ntrain:\n")
    settings, _ = parse([str(tmp_path / "run.yaml")])
    assert (settings.prompts, settings.ppo, settings.train) == ("12", {"learning_rate": 1e-5}, {})


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run.yaml").write_text("modle: gpt2\n")
    assert main([str(tmp_path / "run.yaml")]) == 2
    assert "there is no setting 'modle' (did you mean 'model'?)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.txt"])
def test_prompts_are_read_with_their_encoding(world: Path, name: str, tmp_path: Path) -> None:
    texts = ["Der Film war schön", "Über die Straße"]
    rows = ["prompt", *texts] if name.endswith(".csv") else texts
    (tmp_path / name).write_bytes("\n".join(rows).encode("cp1252"))
    tokenizer = AutoTokenizer.from_pretrained(world / "gpt2")
    prompts = load_prompts(str(tmp_path / name), tokenizer, "cp1252")
    assert isinstance(prompts, PromptDataset) and prompts.batch([0, 1]).texts == texts
    with pytest.raises(ValueError, match=r"not UTF-8 text .* --encoding cp1252"):
        load_prompts(str(tmp_path / name), tokenizer)


def test_the_system_column_is_part_of_the_prompt(tmp_path: Path) -> None:
    said, asked = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    rows = [{"prompt": "Hi", "system": "Be kind."}, {"prompt": "Hi", "system": None}, {"prompt": [asked], "system": ""}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(str(tmp_path / "prompts.jsonl"))["prompt"] == [[said, asked], [asked], [asked]]
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "Hi", "system": ""}))
    assert read_prompts(str(tmp_path / "plain.jsonl"))["prompt"] == ["Hi"]
    rows = [{"instruction": "Hi", "system": "Be kind."}, {"instruction": "Hi", "system": None}]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(str(tmp_path / "alpaca.jsonl"))["prompt"] == [[said, asked], [asked]]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.jsonl", '{"prompt": "a", "x": 1}\n{"prompt": "b", "y": [1]}\n', ["a", "b"]),
        ("p.csv", "Question;Answer\na;1\n;\nb;2\n", ["a", "b"]),
        ("p.txt", "a\n\nb\n", ["a", "b"]),
    ],
)
def test_prompts_are_found_as_other_readers_find_them_and_no_column_is_lost(
    world: Path, name: str, content: str, prompts: list[str], tmp_path: Path
) -> None:
    """The columns of the first row were taken for those of all."""
    (tmp_path / name).write_text(content)
    data = load_prompts(str(tmp_path / name), AutoTokenizer.from_pretrained(world / "gpt2"))
    assert isinstance(data, PromptDataset)
    batch = data.batch([0, 1])
    assert batch.texts == prompts
    if name == "p.jsonl":
        assert batch.columns["x"] == [1, None] and batch.columns["y"] == [None, [1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"a"\n', "p.jsonl:1: expected an object with named fields, got str"),
        ('{"prompt": "a", "x": 1}\n{"prompt": "b", "x": "b"}\n', "column 'x' holds values that no table has in one"),
        ('{"prompt": "a", "id": 123456789012345678901234567890}\n', "column 'id' holds values that no table has"),
    ],
)
def test_prompts_that_no_table_holds_are_one_line(world: Path, content: str, message: str, tmp_path: Path) -> None:
    """They ended in tracebacks, or in pyarrow's own words."""
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / "p.jsonl"), AutoTokenizer.from_pretrained(world / "gpt2"))
