"""Prompts: three forms of a dataset become token ids with every change counted; the order is seeded and resumable."""

from datetime import datetime
from types import SimpleNamespace

import datasets
import jaxtyping
import pytest

from rlhf_ppo.rollout.prompts import PromptDataset, PromptSampler
from tests.support.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, tiny_tokenizer

TEXTS = ["The movie was good.", "", "I liked this film a lot", "bad"]


@pytest.fixture
def wrong_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets values of a wrong type through to the messages that a user gets, who runs without shape checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_texts_become_the_tokenizers_ids_and_bring_their_columns_along() -> None:
    tokenizer = tiny_tokenizer()
    dataset = datasets.Dataset.from_dict({"review": TEXTS, "label": [1, 0, 1, 0]})
    prompts = PromptDataset(dataset, tokenizer, column="review")
    assert len(prompts) == 3
    batch = prompts.batch([2, 0])
    assert [ids.tolist() for ids in batch.input_ids] == [tokenizer("bad").input_ids, tokenizer(TEXTS[0]).input_ids]
    assert batch.texts == ["bad", TEXTS[0]]
    assert batch.columns == {"review": ["bad", TEXTS[0]], "label": [0, 1]}
    assert batch.indices == [2, 0]


def test_an_empty_prompt_is_left_out_and_counted() -> None:
    report = PromptDataset.from_texts(TEXTS, tiny_tokenizer()).report
    assert (report.rows, report.kept, report.empty, report.truncated) == (4, 3, 1, 0)
    assert report.describe() == "3 of 4 prompts from column 'prompt' (1 left out as empty)"


@pytest.mark.parametrize(
    ("truncation", "expected"), [("keep_end", [[5, 6], [9]]), ("keep_start", [[3, 4], [9]]), ("drop", [[9]])]
)
def test_each_truncation_rule_keeps_what_its_name_says(truncation: str, expected: list[list[int]]) -> None:
    dataset = datasets.Dataset.from_dict({"input_ids": [[3, 4, 5, 6], [9]]})
    prompts = PromptDataset(dataset, tiny_tokenizer(), max_prompt_tokens=2, truncation=truncation)  # type: ignore[arg-type]
    assert [prompts[index].tolist() for index in range(len(prompts))] == expected
    assert prompts.report.truncated == (truncation != "drop")
    assert prompts.report.too_long == (truncation == "drop")
    assert "2 tokens" in prompts.report.describe()


def test_a_prompt_beyond_the_limit_is_an_error_where_that_is_the_rule() -> None:
    with pytest.raises(ValueError, match="row 1 has 3 tokens, max_prompt_tokens is 2"):
        PromptDataset(_tokens([[3], [3, 4, 5]]), tiny_tokenizer(), max_prompt_tokens=2, truncation="error")


def test_ready_token_ids_win_over_the_text_that_they_were_made_from() -> None:
    """Scripts that cut reviews themselves keep both columns; the ids are what they decided on."""
    dataset = datasets.Dataset.from_dict({"query": ["The movie"], "input_ids": [[9, 8]], "attention_mask": [[1, 1]]})
    batch = PromptDataset(dataset.with_format("torch"), tiny_tokenizer()).batch([0])
    assert batch.input_ids[0].tolist() == [9, 8]
    assert batch.columns == {"query": ["The movie"]}


def test_a_conversation_is_rendered_up_to_the_start_of_the_answer() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    prompts = PromptDataset(datasets.Dataset.from_dict({"prompt": [turns]}), tokenizer)
    batch = prompts.batch([0])
    assert batch.texts == ["system: Be kind.\nuser: Hello\nassistant: "]
    assert batch.columns == {"prompt": [turns]}
    assert prompts.report.form == "conversation"


def test_a_rendered_conversation_gets_no_second_beginning_of_sequence_token() -> None:
    """Templates write special tokens themselves: with both, the model reads a start it has never seen in training."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "<eos>" + str(tokenizer.chat_template)
    dataset = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "Hi"}]]})
    assert PromptDataset(dataset, tokenizer)[0].tolist().count(EOS_TOKEN_ID) == 1


def test_prompts_that_end_in_eos_are_counted_because_they_tell_a_decoder_to_stop() -> None:
    report = PromptDataset(_tokens([[5, EOS_TOKEN_ID], [5]]), tiny_tokenizer()).report
    assert report.ending_in_eos == 1
    assert "1 end in the end-of-sequence token" in report.describe()


def test_a_missing_column_is_named_together_with_those_that_exist() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
    with pytest.raises(ValueError, match=r"No column 'input_ids' or 'prompt' or 'query'.*has 'text', 'label'"):
        PromptDataset(dataset, tiny_tokenizer())
    with pytest.raises(ValueError, match=r"No column 'review'"):
        PromptDataset(dataset, tiny_tokenizer(), column="review")


def test_ids_of_another_tokenizer_are_refused_by_row() -> None:
    with pytest.raises(ValueError, match=rf"Row 1 .* token ids from 4 to 999, .* 0 to {VOCAB_SIZE - 1}"):
        PromptDataset(_tokens([[3], [999, 4]]), tiny_tokenizer())


def test_a_row_of_another_type_is_refused_by_row() -> None:
    with pytest.raises(TypeError, match="Row 1 of column 'prompt' holds NoneType, but row 0 holds text"):
        PromptDataset(datasets.Dataset.from_dict({"prompt": ["a", None]}), tiny_tokenizer())
    with pytest.raises(TypeError, match="must hold texts, token ids, or conversations"):
        PromptDataset(datasets.Dataset.from_dict({"prompt": [1.5]}), tiny_tokenizer())


def test_conversations_that_cannot_be_answered_are_refused() -> None:
    answered = datasets.Dataset.from_dict({"prompt": [[{"role": "assistant", "content": "Bye"}]]})
    with pytest.raises(ValueError, match=r"row 0 .* assistant turn at its end"):
        PromptDataset(answered, tiny_tokenizer(chat=True))
    asked = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "Hi"}]]})
    with pytest.raises(ValueError, match="no chat template"):
        PromptDataset(asked, tiny_tokenizer())
    with pytest.raises(ValueError, match="'keep_start' would cut off the end of a conversation"):
        PromptDataset(asked, tiny_tokenizer(chat=True), truncation="keep_start")


@pytest.mark.usefixtures("wrong_types")
def test_only_one_split_with_random_access_is_a_prompt_dataset() -> None:
    split = datasets.Dataset.from_dict({"prompt": ["a"]})
    with pytest.raises(TypeError, match=r"2 \(train, test\): .*Pass one"):
        PromptDataset(datasets.DatasetDict(train=split, test=split), tiny_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="IterableDataset"):
        PromptDataset(split.to_iterable_dataset(), tiny_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no rows"):
        PromptDataset(split.select([]), tiny_tokenizer())
    with pytest.raises(ValueError, match="No prompt is left: 0 of 1 prompts"):
        PromptDataset.from_texts([""], tiny_tokenizer())


def test_a_column_named_like_a_keyword_of_reward_sources_is_refused() -> None:
    dataset = datasets.Dataset.from_dict({"prompt": ["a"], "responses": ["b"]})
    with pytest.raises(ValueError, match="'responses' has the name of a keyword"):
        PromptDataset(dataset, tiny_tokenizer())


@pytest.mark.usefixtures("wrong_types")
def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_prompt_tokens must be at least 1"):
        PromptDataset(_tokens([[3]]), tiny_tokenizer(), max_prompt_tokens=0)
    with pytest.raises(ValueError, match="truncation must be one of keep_end, keep_start, drop, error, got 'left'"):
        PromptDataset(_tokens([[3]]), tiny_tokenizer(), truncation="left")  # type: ignore[arg-type]


def test_every_epoch_draws_each_prompt_once_in_another_order() -> None:
    """10 prompts in batches of 4: the third batch holds the last two of epoch 0 and the first two of epoch 1."""
    sampler = PromptSampler(10, batch_size=4, seed=0)
    drawn = [index for _ in range(5) for index in next(sampler)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert sampler.epoch == 2.0


def test_a_batch_may_be_larger_than_the_dataset() -> None:
    assert sorted(next(PromptSampler(3, batch_size=6, seed=0))) == [0, 0, 1, 1, 2, 2]


def test_the_seed_alone_decides_the_order() -> None:
    first, same, other = (next(PromptSampler(100, batch_size=50, seed=seed)) for seed in (3, 3, 4))
    assert first == same
    assert first != other


def test_processes_split_what_one_process_would_draw() -> None:
    whole = PromptSampler(23, batch_size=6, seed=1)
    parts = [PromptSampler(23, batch_size=2, seed=1, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(9):
        assert next(whole) == [index for part in parts for index in next(part)]


def test_prompts_are_dealt_out_by_length_and_each_to_one_process() -> None:
    """Prompts of 1 to 60 tokens, in no order: no process reads more than the longest prompt above another."""
    lengths = [1 + (37 * index) % 60 for index in range(60)]
    whole = PromptSampler(60, batch_size=20, seed=1)
    parts = [PromptSampler(60, batch_size=5, seed=1, rank=rank, world_size=4, lengths=lengths) for rank in range(4)]
    for _ in range(6):
        shares = [next(part) for part in parts]
        assert sorted(index for share in shares for index in share) == sorted(next(whole))
        assert [len(share) for share in shares] == [5] * 4
        tokens = [sum(lengths[index] for index in share) for share in shares]
        assert max(tokens) - min(tokens) <= 60


def test_a_loaded_sampler_goes_on_exactly_where_the_saved_one_stood() -> None:
    sampler = PromptSampler(7, batch_size=3, seed=5)
    for _ in range(4):
        next(sampler)
    state = sampler.state_dict()
    resumed = PromptSampler(7, batch_size=3, seed=5)
    resumed.load_state_dict(state)
    assert [next(sampler) for _ in range(6)] == [next(resumed) for _ in range(6)]


def test_the_position_survives_a_change_of_the_number_of_processes() -> None:
    pair = [PromptSampler(11, batch_size=2, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for sampler in pair:
        next(sampler)
    alone, whole = PromptSampler(11, batch_size=4, seed=0), PromptSampler(11, batch_size=4, seed=0)
    alone.load_state_dict(pair[1].state_dict())
    next(whole)
    assert next(alone) == next(whole)


def test_the_order_of_another_dataset_or_seed_is_not_resumed() -> None:
    sampler = PromptSampler(7, batch_size=3, seed=5)
    with pytest.raises(ValueError, match="has length 8, this run has 7"):
        sampler.load_state_dict({"seed": 5, "length": 8, "position": 0})
    with pytest.raises(ValueError, match="has seed 6, this run has 5"):
        sampler.load_state_dict({"seed": 6, "length": 7, "position": 0})


def test_the_order_is_resumed_on_another_day_where_the_template_writes_the_date(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)

    def order(day: int, text: str) -> PromptSampler:
        today = SimpleNamespace(now=lambda: datetime(2026, 12, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", today)
        conversations = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": text}]] * 3})
        prompts = PromptDataset(conversations, tokenizer)
        assert prompts.batch([0]).texts[0].startswith(f"0{day} Dec 2026")
        return PromptSampler(len(prompts), batch_size=1, seed=5, checksum=prompts.checksum)

    saved = order(1, "Hello").state_dict()
    order(2, "Hello").load_state_dict(saved)
    with pytest.raises(ValueError, match="has checksum"):
        order(2, "Hi").load_state_dict(saved)


@pytest.mark.parametrize("wrong", [{"length": 0}, {"batch_size": 0}, {"seed": -1}, {"rank": 2}])
def test_a_sampler_refuses_sizes_that_make_no_order(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="PromptSampler needs"):
        PromptSampler(**({"length": 5, "batch_size": 1, "seed": 0, "rank": 0, "world_size": 2} | wrong))


def _tokens(rows: list[list[int]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": rows})
