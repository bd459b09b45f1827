"""Tiny random models and a tiny tokenizer, built in code: no test needs a network.

Every builder draws its weights from `seed` without touching the global random state, so that two calls with one
seed give equal models and a test's own draws do not depend on which helpers ran before.
"""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PAD_TOKEN_ID = 0
EOS_TOKEN_ID = 1
VOCAB_SIZE = 320

TRAINING_TEXT = """
The movie was good. The movie was bad. I liked this film a lot and I would watch it again.
This film was boring and I did not like the plot. What a wonderful story, the actors were great!
What a terrible story, the actors were awful. My morning began with a walk to the cinema.
We went to see the film with our friends; the music was lovely, but the ending was a disappointment.
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@cache
def _tokenizer_json() -> str:
    """The trained byte-level tokenizer, serialized once per process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TRAINING_TEXT.splitlines(), trainer=trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(*, padding_side: str = "left", chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens that encodes any text: `<pad>` is 0, `<eos>` is 1, no BOS.

    Args:
        padding_side: "left" or "right".
        chat: whether to carry a chat template ("role: content" lines).
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before a text and drops it when it decodes, as those of Llama 2 and Mistral do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["user: assistant: the film was good, \n a"] * 5, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def tiny_gpt2(
    *,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    n_layer: int = 2,
    n_embd: int = 32,
    n_head: int = 2,
    n_positions: int = 128,
    dropout: float = 0.0,
    initializer_range: float = 0.2,
    dtype: torch.dtype = torch.float32,
) -> GPT2LMHeadModel:
    """A random GPT-2 in eval mode; `initializer_range` 0.2 makes its distributions far from uniform."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_positions=n_positions,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=initializer_range,
        bos_token_id=EOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).to(dtype).eval()


def tiny_llama(
    *,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    num_hidden_layers: int = 2,
    hidden_size: int = 32,
    tie_word_embeddings: bool = False,
    initializer_range: float = 0.2,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A random Llama (rotary positions, grouped-query attention, untied output embeddings) in eval mode."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        num_hidden_layers=num_hidden_layers,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        bos_token_id=EOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()


def tiny_t5(
    *,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    num_layers: int = 2,
    d_model: int = 32,
    dtype: torch.dtype = torch.float32,
) -> T5ForConditionalGeneration:
    """A random T5 (encoder-decoder) in eval mode, without dropout."""
    config = T5Config(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_decoder_layers=num_layers,
        d_model=d_model,
        d_kv=8,
        d_ff=2 * d_model,
        num_heads=4,
        dropout_rate=0.0,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
        decoder_start_token_id=PAD_TOKEN_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(config).to(dtype).eval()
