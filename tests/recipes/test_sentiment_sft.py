"""The small language model: learns, is cached by what it was made from, and can be loaded by name. No network."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sentiment.assets import cache_root, kept_beside
from sentiment.command_line import MOST_THREADS, use_threads
from sentiment.language_models import (
    AdaptationConfig,
    adapted_model,
    fit_tokenizer,
    load_language_model,
    model_location,
)
from sentiment.reviews import Review, train_tokenizer, training_rows
from sentiment.sft import (
    SFTConfig,
    batches,
    learning_rate,
    make_optimizers,
    new_model,
    small_language_model,
    train_language_model,
)
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer

TINY = SFTConfig(
    vocabulary_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32, row_length=12, batch_size=4, steps=40
)
REVIEWS = [
    Review(f"The film {i} was good. I liked it a lot, and I would see it again and again.", 1) for i in range(30)
]


def test_the_small_model_learns_is_cached_and_loads_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path))
    model, tokenizer = load_language_model("gpt2-small-reviews", reviews=REVIEWS, sft=TINY)
    ids = tokenizer(REVIEWS[0].text, return_tensors="pt").input_ids[:, : TINY.row_length]
    uniform = torch.log(torch.tensor(float(len(tokenizer))))
    assert model(input_ids=ids, labels=ids).loss < 0.6 * uniform
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.decode(tokenizer("Don't, it's a film!").input_ids) == "Don't, it's a film!"

    folder = model_location("gpt2-small-reviews", reviews=REVIEWS, sft=TINY)
    before = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert model_location("gpt2-small-reviews", reviews=REVIEWS, sft=TINY) == folder
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == before
    assert Path(folder).parent == cache_root() / "models"


def test_another_setting_or_another_text_is_another_model_and_the_same_is_bitwise_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(TINY, steps=3)
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path / "a"))
    first = small_language_model(REVIEWS, short)
    assert small_language_model(REVIEWS, replace(short, seed=1)) != first
    assert small_language_model(REVIEWS[1:], short) != first
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path / "b"))
    again = small_language_model(REVIEWS, short)
    assert again.name == first.name
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_training_leaves_the_random_state_and_the_threads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    small_language_model(REVIEWS, replace(TINY, steps=1))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_too_few_long_reviews_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="One step needs 4 reviews of at least 12 tokens, got 0 of 1"):
        small_language_model([Review("Short.", 1)], TINY)


def test_openings_begin_a_review_and_stretches_begin_a_sentence() -> None:
    text = "The film was good. I liked it a lot, and I would see it again. So would you, I think."
    tokenizer = train_tokenizer([text], vocabulary_size=300)
    openings, stretches = training_rows(tokenizer, [text, "No."], length=12)
    ids = tokenizer(text).input_ids
    assert openings.tolist() == [ids[:12]]
    assert stretches.tolist()[0] == ids[:12]
    end = tokenizer.convert_tokens_to_ids(".")
    begins = [start for start in range(1, len(ids) - 11) if ids[start - 1] == end]
    assert all(any(row == ids[start : start + 12] for start in begins) for row in stretches.tolist()[1:])


def test_the_learning_rate_rises_to_its_peak_and_falls_in_a_line() -> None:
    config = replace(TINY, steps=100, warmup_fraction=0.1, final_learning_rate=0.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[49] == pytest.approx(0.5) and rates[99] == pytest.approx(0.0)


def test_every_weight_belongs_to_one_optimizer_and_the_tied_embedding_is_not_orthogonalized() -> None:
    model = new_model(TINY, train_tokenizer([REVIEWS[0].text], vocabulary_size=300))
    *muons, adam = ([p for group in o.param_groups for p in group["params"]] for o in make_optimizers(model, TINY))
    trained = [id(p) for p in chain(*muons, adam)]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    assert model.get_output_embeddings().weight in set(adam)
    assert [len(muon) for muon in muons] == [1] * (4 * TINY.n_layer)


def test_a_state_that_another_version_kept_is_trained_over(tmp_path: Path) -> None:
    kept = kept_beside(tmp_path / "model")
    kept.mkdir()
    torch.save({"done": 2, "parts": {"model": {}, "muon": {}}}, kept / "state.pt")
    train_language_model(REVIEWS, replace(TINY, steps=3), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_batches_visit_each_row_once_a_pass() -> None:
    rows = torch.arange(6).reshape(6, 1)
    stream = batches(rows, 2, torch.Generator().manual_seed(0))
    for _ in range(3):
        assert sorted(torch.cat([next(stream) for _ in range(3)]).flatten().tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"row_length": 33}, "do not fit into n_positions=32"), ({"n_head": 3}, "cannot be shared evenly by n_head=3")],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_threads_are_this_processs_share_of_the_cores_or_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` sets OMP_NUM_THREADS to 1 by itself, so nobody can say it by that variable."""
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for cores, processes in ((2, 1), (4, 2), (2, 4), (64, 1)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        use_threads()
    use_threads(3)
    assert taken == [2, 2, 1, MOST_THREADS, 3]
    with pytest.raises(ValueError, match="At least one thread"):
        use_threads(0)


def saved(folder: Path, model: GPT2LMHeadModel, tokenizer: object) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return str(folder)


def test_a_folder_without_a_padding_token_pads_with_the_end_of_text_on_the_left(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(padding_side="right")
    tokenizer.pad_token = None
    model, loaded = load_language_model(saved(tmp_path, tiny_gpt2(), tokenizer))
    assert loaded.pad_token == loaded.eos_token and loaded.padding_side == "left"
    assert model.config.pad_token_id == loaded.eos_token_id


def test_a_tokenizer_without_any_special_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        fit_tokenizer("toy", tiny_gpt2(), tokenizer)


def test_a_tokenizer_larger_than_its_model_is_refused() -> None:
    small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match="has 320 tokens but its model only 100 embeddings"):
        fit_tokenizer("toy", small, tiny_tokenizer())


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "a/b/c"])
def test_a_missing_folder_names_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match=r"There is no model folder .* gpt2-small-reviews or smollm2-135m"):
        load_language_model(name)


def test_a_name_that_cannot_be_reached_and_a_model_of_another_kind_name_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`nobody/nothing` could not be loaded as a causal language model"):
        load_language_model("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"could not be loaded .* Choose gpt2-small-reviews"):
        load_language_model(str(tmp_path))


def test_the_saved_small_model_is_an_ordinary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path))
    folder = small_language_model(REVIEWS, replace(TINY, steps=1))
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), GPT2LMHeadModel)
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|pad|>"


def test_a_pretrained_model_is_adapted_once_and_saved_without_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "toy-0123"
    saved(base, tiny_llama(), tiny_tokenizer())
    config = AdaptationConfig(row_length=12, batch_size=4, steps=12, rank=4, learning_rate=1e-2)
    folder = adapted_model(base, REVIEWS, config)
    assert adapted_model(base, REVIEWS, config) == folder and folder.name.startswith("toy-reviews-")
    assert not (folder / "adapter_config.json").exists()
    ids = tiny_tokenizer()(REVIEWS[0].text, return_tensors="pt").input_ids[:, :12]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=ids, labels=ids).loss.item()
        for path in (base, folder)
    )
    assert after < before - 0.5
    with pytest.raises(ValueError, match="One step needs 4 reviews of at least 12 tokens, got 0 of 1"):
        adapted_model(base, [Review("Short.", 1)], config)
