"""Every causal language model that the installed transformers knows, small and random: its registry is the list.

A config class is built with the sizes of `SIZES` where it has such fields. Sizes that do not go together in a family
are found by trying: `CHANGES`, alone and in pairs, until the base runs forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

DEPTH = 4
VOCABULARY = 100
MOST_PARAMETERS = 20e6
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("attention_hidden_size", "conv_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), DEPTH),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "v_head_dim", "qk_nope_head_dim", "index_head_dim", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "hidden_size_per_layer_input", "index_topk"), 8),
    **dict.fromkeys(("q_lora_rank", "qk_head_dim"), 24),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dim_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "num_codebooks"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("sliding_window", "attention_window_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 128, "n_groups": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "time_step_rank": 4,
    "audio_vocab_size": 50, "num_kv_shared_layers": 0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {"num_key_value_heads": 4},
    {"num_experts_per_tok": 1},
    {"n_routed_experts": 4},
    {"head_dim": 16},
    {"head_dim": 32, "attention_hidden_size": 128, "attention_head_dim": 32},
    {"attention_hidden_size": 128},
    {"hidden_size_per_layer_input": 0},
    {"is_decoder": True},
    {"default_language": "en_XX"},
    {"attention_layers": ["global", "local"] * 2, "attention_types": [[["global", "local"], 2]]},
    {"attn_layer_indices": [1]},
    {"attn_layer_period": 2, "attn_layer_offset": 1},
    {"layers_block_type": ["mamba", "attention"] * 2},
    {"layer_types": ["conv", "full_attention"] * 2},
]
# Kinds of blocks of families whose config class has but one by default, by their type.
HYBRIDS = {"lfm2": ["conv", "full_attention"] * 2}
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")


def families() -> dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]]:
    """Config and model class of every family, by its `model_type`."""
    return {
        config.model_type: (config, model[0] if isinstance(model, tuple) else model)
        for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items()
    }


def small_base(config: type[PretrainedConfig], model: type[PreTrainedModel]) -> PreTrainedModel:
    """A small random base in eval mode, the same in every call; what the first try raised if none runs forward."""
    first: Exception | None = None
    for change in ({}, *CHANGES, *(one | other for one, other in itertools.combinations(CHANGES, 2))):
        try:
            return _made(small_config(config, change), model)
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def small_config(config: type[PretrainedConfig], change: dict[str, Any]) -> PretrainedConfig:
    """`config` with the sizes that it has of `SIZES`, and of `change`."""
    default = config()
    fields = dict(_sizes(config, default, change))
    if "qk_rope_head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]
    for name in KINDS:
        if (kinds := getattr(default, name, None)) and _can_be_set(config, name):
            # Of all kinds that it has, the last ones last, as hybrids end with attention.
            fields[name] = (list(dict.fromkeys(kinds))[::-1] * DEPTH)[:DEPTH][::-1]
    if config.model_type in HYBRIDS:
        fields["layer_types"] = HYBRIDS[config.model_type]
    fields |= {name: value for name, value in change.items() if hasattr(default, name) and _can_be_set(config, name)}
    return config(**fields)


def _sizes(
    config: type[PretrainedConfig], default: PretrainedConfig, change: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    for name, value in vars(default).items():
        if not _can_be_set(config, name) or isinstance(value, bool):
            continue
        if isinstance(value, PretrainedConfig):
            yield name, small_config(type(value), change)
        elif name in SIZES and (isinstance(value, int) or name.endswith("token_id")):
            yield name, SIZES[name]
        elif name in SIZES and isinstance(value, list) and all(isinstance(each, int) for each in value):
            yield name, [SIZES[name]] * DEPTH
    for name, alias in (config.attribute_map or {}).items():
        if name in SIZES and alias not in SIZES and isinstance(getattr(default, alias, None), int):
            yield alias, SIZES[name]


def _can_be_set(config: type[PretrainedConfig], name: str) -> bool:
    found = getattr(config, (config.attribute_map or {}).get(name, name), None)
    return not isinstance(found, property) or found.fset is not None


def _made(config: PretrainedConfig, model: type[PreTrainedModel]) -> PreTrainedModel:
    with torch.device("meta"):
        try:
            size = sum(parameter.numel() for parameter in model(config).parameters())
        except AttributeError:  # a config of more than the text
            config = config.get_text_config()
            size = sum(parameter.numel() for parameter in model(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:.2g} parameters are more than small.")
    torch.manual_seed(0)
    base = model(config).eval()
    with torch.no_grad():
        base(input_ids=torch.randint(3, VOCABULARY, (2, 7)))
    return base
