"""Where in a base model the side network attaches, found from the module tree.

The *decoder* is the module that owns the list of transformer blocks; the *final norm* is its norm behind that list.
Hidden states are tapped at the embeddings and behind every block, and the final norm's output is replaced by the
mixture, so that every head and every fused loss downstream works on the mixture unchanged (QST, section 3).
"""

from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ...sharding import shape_of
from ..network import BaseShape


@dataclass(frozen=True)
class Decoder:
    """Where a side network attaches.

    Attributes:
        module: Owns the list of blocks.
        norm_path: Path of the final norm in the whole model.
        stream: Which one to follow, where blocks hand on several streams (Gemma 3n's AltUp).
    """

    module: nn.Module
    blocks: nn.ModuleList
    norm_path: str
    shape: BaseShape
    stream: int | None = None


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder of a transformers model, possibly with a side network already attached.

    Raises:
        ValueError: when the model is an encoder-decoder, has no block list with a final norm, or attends in both
            directions.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{name} has no transformers config; side tuning needs a transformers causal language model.")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; side tuning needs a decoder-only language model.")
    text_config = config.get_text_config(decoder=True)

    adapters = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    owners = [
        (path, module, block_list)
        for path, module in model.named_modules()
        if not any(path.startswith(f"{adapter}.") for adapter in adapters)
        for block_list in _block_lists(module)
    ]
    if not owners:
        raise ValueError(f"{name} has no list of transformer blocks; side tuning needs a decoder-only language model.")
    # A model can own further lists: those of a vision tower, or of heads.
    language_model = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    inside = {id(module) for module in language_model.modules()}
    depth = getattr(text_config, "num_hidden_layers", None)
    path, decoder, blocks = max(
        owners, key=lambda owner: (id(owner[1]) in inside, len(owner[2]) == depth, _size(owner[2]))
    )

    hidden_size = int(text_config.hidden_size)
    norm_name = _final_norm_name(decoder, blocks, hidden_size)
    if norm_name is None:
        raise ValueError(
            f"{name} has no norm behind its {len(blocks)} blocks, so there is no place to mix in the side network; "
            "use a model with a final norm."
        )
    _require_causal_attention(name, blocks)

    norm = getattr(decoder, norm_name)
    norm = norm.get_base_layer() if isinstance(norm, BaseTunerLayer) else norm
    shape = BaseShape(
        hidden_size=hidden_size,
        num_layers=len(blocks),
        intermediate_size=_intermediate_size(text_config) or 4 * hidden_size,
        activation=_activation(text_config),
        gated_mlp=any("gate" in path for path, _ in blocks[0].named_parameters()),
        centered_norm=getattr(norm, "bias", None) is not None,
        norm_eps=float(_first(norm, "variance_epsilon", "eps") or 1e-6),
        rotary=any(path.endswith("inv_freq") for path, _ in decoder.named_buffers()),
        config=text_config,
    )
    norm_path = f"{path}.{norm_name}" if path else norm_name
    return Decoder(decoder, blocks, norm_path, shape, stream=getattr(text_config, "altup_active_idx", None))


def _block_lists(module: nn.Module) -> list[nn.ModuleList]:
    return [
        child
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) > 0 and all(_size(block) > 0 for block in child)
    ]


def _size(module: nn.Module) -> int:
    return sum(shape_of(parameter).numel() for parameter in module.parameters())


def _final_norm_name(decoder: nn.Module, blocks: nn.ModuleList, hidden_size: int) -> str | None:
    """The last registered child that is a norm of the hidden size; one named for embeddings only behind the blocks."""
    found, behind = [], False
    for name, child in decoder.named_children():
        behind = behind or child is blocks
        norm = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        as_wide = all(shape_of(parameter) == (hidden_size,) for parameter in norm.parameters())
        if "norm" in type(norm).__name__.lower() and as_wide and (behind or "embed" not in name):
            found.append(name)
    return max(found, key=lambda name: ("embed" not in name, found.index(name)), default=None)


def _intermediate_size(config: PretrainedConfig) -> int | None:
    size = _first(config, "intermediate_size", "ffn_dim", "n_inner")
    return int(max(size) if isinstance(size, (list, tuple)) else size) if size else None


def _require_causal_attention(name: str, blocks: nn.ModuleList) -> None:
    # Decoders taken out of an encoder-decoder keep their attention to the encoder, which does not run.
    own = (module for path, module in blocks[0].named_modules() if "encoder" not in path and "cross" not in path)
    if any(getattr(module, "is_causal", getattr(module, "is_decoder", True)) is False for module in own):
        raise ValueError(f"{name} attends in both directions; side tuning needs a causal language model.")


def _activation(config: PretrainedConfig) -> str:
    name = _first(config, "hidden_activation", "hidden_act", "activation_function")
    return name if isinstance(name, str) and name in ACT2FN else "gelu"


def _first(owner: object, *names: str) -> Any:
    return next((value for name in names if (value := getattr(owner, name, None)) is not None), None)
