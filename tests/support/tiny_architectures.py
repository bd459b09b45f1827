"""Tiny random models of every text-generating architecture of the installed transformers,
built from config classes."""

import inspect
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim": 32,
    "emb_dim": 32, "embedding_size": 32, "embedding_dim": 32, "dim_model": 32, "model_dim": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_encoder_layers": 2, "num_decoder_layers": 2, "num_blocks": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "attention_head_size": 8, "dim_head": 8, "d_kv": 8,
    "attention_hidden_size": 32,
    "intermediate_size": 64, "n_inner": 64, "d_ff": 64, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "dim_ff": 64, "dff": 64, "ffn_hidden_size": 64, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "hidden_dim": 32,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "max_target_positions": 64,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1,
    "state_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4,
    "attention_dropout": 0.0, "dropout": 0.0, "initializer_range": 0.2, "init_std": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0, "sliding_window": 8,
    "image_size": 16, "patch_size": 8, "num_channels": 3,
}  # fmt: skip


DECODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod", "reformer",
)  # fmt: skip
"""Encoders that are causal models as decoders only."""
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in DECODERS},
    **dict.fromkeys(("bailing_hybrid", "granitemoehybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "kimi_linear", "qwen4_exp", "qwen4_exp_text"), HYBRID),
    **{name: {"num_key_value_heads": 4, "head_dim": 8} for name in (
        "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3",
        "youtu",
        "longcat_flash",
    )},
    "bailing_hybrid": {
        **HYBRID, "num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"], "linear_head_dim": 8,
        "linear_num_heads": 4, "num_expert_group": 1, "topk_group": 1, "num_experts_per_token": 2,
    },
    "kimi_linear": {
        **HYBRID, "num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"], "linear_head_dim": 8,
        "linear_num_heads": 4, "num_experts_per_token": 2,
    },
    "bamba": {"attn_layer_indices": [1], "layer_types": ["linear_attention", "full_attention"]},
    "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in ("full_attention", "sliding_attention")
        },
    },
    "ernie4_5_moe": {"moe_k": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {
        "num_key_value_heads": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32, "moe_topk": 2,
        "num_hidden_layers": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": 32},
    "roc_bert": {
        "is_decoder": True, "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 96, "shape_embed_dim": 8,
        "shape_vocab_size": 96,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 4,
        "hidden_size": 32, "attention_head_size": 8, "feed_forward_size": 64, "hash_seed": 0,
        "max_position_embeddings": 64,
    },
    "xlm": {"causal": True},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "mamba_dt_rank": 4, "n_mamba_heads": 2,
    "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8, "mamba_ngroups": 1,
    "mamba_headdim": 8, "use_mem_rope": True, "adapter_rank": 4, "chunk_size": 8},
    "llama4": {"attention_chunk_size": 8}, "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
    "laurel_rank": 4, "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0,
    0.0], "intermediate_size": [64, 64]},
    "gemma4_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 8.0}, "granitemoe": {"logits_scaling": 8.0},
    "granitemoeshared": {"logits_scaling": 8.0},
    "olmo": {"clip_qkv": 0.5}, "olmoe": {"clip_qkv": 0.5},
}  # fmt: skip
for vision in ("qwen2_vl_text", "qwen2_5_vl_text"):
    OVERRIDES[vision] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
OVERRIDES["granitemoehybrid"] = {**HYBRID, "logits_scaling": 4.0}
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "depth": 1,
    "embed_dim": 32,
}


def fields_of(kind: type) -> set[str]:
    """Names of the settings that a config class takes."""
    names: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
        names |= set(vars(base).get("__annotations__", {}))
    return names


def tiny_config(kind: Any, **overrides: Any) -> Any:
    """A small config of `kind`, its parts included."""
    known = fields_of(kind)
    settings = {name: value for name, value in SIZES.items() if name in known}
    parts = getattr(kind, "sub_configs", None) or {}
    whole = kind() if parts and AutoConfig in parts.values() else None
    for name, part in parts.items():
        if name not in known:
            continue
        part = type(getattr(whole, name, None)) if part is AutoConfig else part
        if part is type(None):
            continue
        own = OVERRIDES.get(getattr(part, "model_type", ""), {})
        settings[name] = tiny_config(part, **own)
    settings |= overrides
    return kind(**settings)


def config_of(name: str) -> Any:
    """The small config of a model type."""
    return tiny_config(CONFIG_MAPPING[name], **OVERRIDES.get(name, {}))
