"""Fingerprint of a scoring run: the same for the same weights, tokenizer and settings, in any process.

Finished parts are found again by it, so a change that it leaves out would find scores of something else.
"""

import json
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, Protocol

import bitsandbytes
import torch
import xxhash
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..head import causal_model

# Changes when scores change for the same input.
VERSION = 4
CHUNK_BYTES = 2**26


class Fingerprinted(Protocol):
    """What adds to a digest all that it depends on."""

    def add_to(self, digest: xxhash.xxh3_128) -> None:
        """Add it."""


def fingerprint(settings: Sequence[Any], tokenizer: Any, engines: Sequence[Fingerprinted]) -> str:
    """Fingerprint of scoring by `engines` with `settings`."""
    digest = xxhash.xxh3_128()
    digest.update(stable([VERSION, *settings]))
    if tokenizer is not None:
        digest.update(stable([tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]))
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for engine in engines:
        engine.add_to(digest)
    return digest.hexdigest()


def add_model(digest: xxhash.xxh3_128, model: nn.Module) -> None:
    """Add a model's configuration, its adapters' state, and its weights and buffers but for disabled adapters'."""
    digest.update(stable(causal_model(model).config.to_dict()))
    unused: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            digest.update(stable([module.active_adapters, module.disable_adapters]))
            if module.disable_adapters:
                unused += _own_paths(path, module)
    for name, part in _tensors(model, unused):
        add_tensor(digest, name, part)
    for name, config in sorted(getattr(model, "peft_config", {}).items()):
        digest.update(stable([name, config.to_dict()]))


def weights_of(base: nn.Module) -> str:
    """Fingerprint of a model's own weights, whether or not adapters sit in it."""
    digest = xxhash.xxh3_128(type(base).__name__.encode())
    layers = [(path, module) for path, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = [own for path, module in layers for own in _own_paths(path, module)]
    for name, part in _tensors(base, inside):
        add_tensor(digest, name.replace(".base_layer.", "."), part)
    return digest.hexdigest()


def _own_paths(path: str, layer: BaseTunerLayer) -> list[str]:
    """What names of the adapters' own tensors begin with, in the adapted layer at `path`."""
    return [f"{path}.{name}." for name in layer.adapter_layer_names + layer.other_param_names]


def _tensors(model: nn.Module, without: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and parts of all parameters and buffers, but for those whose name begins with one of `without`."""
    for name, value in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        if not name.startswith(tuple(without)):
            for part in parts_of(value, model.get_submodule(name.rpartition(".")[0])):
                yield name, part


def parts_of(value: Any, module: nn.Module) -> list[Any]:
    """The tensors that a parameter or buffer of `module` consists of, the same however kernels have repacked it."""
    if (state := getattr(value, "quant_state", None)) is not None:  # 4 bits, of bitsandbytes
        packed, absmax = value.data, state.absmax
        if getattr(state, "packing_format_for_cpu", False):
            # By a kernel, in place, with scales rounded to bfloat16. On a copy: the inverse also changes the state.
            state, absmax = copy(state), absmax.T
            state.original_nested = False
            packed, _ = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(packed, state)
        elif state.nested:
            absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        return [packed, absmax.reshape(-1).bfloat16(), state.code]
    if is_traceable_wrapper_subclass(value):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    # 8 bits, of bitsandbytes: the first pass moves the scales from the weight to the layer.
    scales = [getattr(value, "SCB", None), getattr(getattr(module, "state", None), "SCB", None)]
    return [value, *(scale for scale in scales if scale is not None)]


def add_tensor(digest: xxhash.xxh3_128, name: str, value: torch.Tensor) -> None:
    """Add the name, type, shape and bytes of a tensor; of one that is elsewhere (`meta`) there are none."""
    digest.update(stable([name, str(value.dtype), value.shape]))
    if not value.is_meta:
        for chunk in value.detach().contiguous().flatten().view(torch.uint8).split(CHUNK_BYTES):
            digest.update(chunk.cpu().numpy())


def stable(value: Any) -> bytes:
    """`value` as bytes that do not depend on the process, as the order of a set does."""
    return json.dumps(value, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v)).encode()
