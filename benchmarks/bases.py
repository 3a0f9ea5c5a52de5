"""Base models of true shapes without weights: built from a configuration, filled with random numbers, in NF4 if wished.

Nothing is downloaded. Speed and memory do not depend on what the weights are. A quantized base is made one linear layer
at a time, straight on its device, so that a model of 70B parameters never exists in 16 bits as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config

from qtuning_peft.side_tuning.follow import find_decoder


def _opt(hidden: int, layers: int, heads: int) -> PretrainedConfig:
    return OPTConfig(
        hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=50272, max_position_embeddings=2048,
        # Dropout masks are memory and time that no other base here has.
        dropout=0.0,
    )  # fmt: skip


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 32000, **more: Any
) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, **{"max_position_embeddings": 4096} | more,
    )  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> PretrainedConfig:
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=128, vocab_size=151936, max_position_embeddings=131072,
        tie_word_embeddings=False,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "opt-2.7b": lambda: _opt(2560, 32, 32),
    "opt-6.7b": lambda: _opt(4096, 32, 32),
    "llama-2-7b": lambda: _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": lambda: _llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": lambda: _llama(8192, 28672, 80, 64, 8),
    "llama-3-8b": lambda: _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072),
    "qwen3-8b": lambda: _qwen3(4096, 12288, 36, 32, 8),
    "smollm2-135m": lambda: _llama(576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192, tie_word_embeddings=True),
    "tiny": lambda: _llama(128, 256, 4, 4, 2, 512),
}


def shape(name: str) -> PretrainedConfig:
    """The configuration called `name`.

    Raises:
        ValueError: when there is none of this name.
    """
    if name not in SHAPES:
        raise ValueError(f"base is {name}; choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]()


def compute_dtype(device: str) -> torch.dtype:
    """What the base computes in: bfloat16 on a GPU, float32 on a CPU, where that is faster."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def skeleton(name: str, dtype: torch.dtype) -> Any:
    """The model without any numbers in it, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(name), dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def build(name: str, four_bit: bool, device: str = "cpu", seed: int = 0) -> Any:
    """A base with random weights on `device`, every linear layer of its blocks in NF4 if `four_bit`."""
    torch.manual_seed(seed)
    dtype = compute_dtype(device)
    model = skeleton(name, dtype)
    if four_bit:
        for block in find_decoder(model).blocks:
            _quantize(block, device, dtype)
        # PEFT and transformers look at these, and then at each layer's type.
        model.is_loaded_in_4bit = model.is_quantized = True
    for module in model.modules():
        if any(tensor.is_meta for tensor in _own_tensors(module)):
            module.to_empty(device=device, recurse=False)
            with torch.no_grad():
                model._init_weights(module)
    model.tie_weights()
    return model.eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers, with the scales of quantized ones; shared storage counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [tensor for tensor in (state.absmax, state.code, state.offset) if isinstance(tensor, Tensor)]
            state = state.state2
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def parameter_count(name: str) -> int:
    """Parameters of a shape; quantized ones are packed and do not tell."""
    return sum(parameter.numel() for parameter in skeleton(name, torch.bfloat16).parameters())


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _quantize(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            _quantize(child, device, dtype)
            continue
        layer = bnb.nn.Linear4bit(
            child.in_features, child.out_features, child.bias is not None, dtype, True, "nf4", device="meta"
        )
        weight = torch.empty(child.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
        if child.bias is not None:
            layer.bias = nn.Parameter(torch.zeros(child.out_features, dtype=dtype, device=device))
        setattr(module, name, layer)
