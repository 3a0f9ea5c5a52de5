"""The settings of a side network, each with its range, its default and what it does.

Quantized Side Tuning (Zhang et al., ACL 2024, arXiv 2401.07159), section 3, with d the hidden size of the base,
r the reduction factor and f_i, g_i the i-th block of the base and of the side network:

    x_i = (1 - beta_i) * down_i(h_fi) + beta_i * h_g(i-1)      h_gi = g_i(x_i)          (width d / r)
    h   = alpha * h_fN + (1 - alpha) * up(h_gN)                                         (width d)

The defaults depart from the paper where that learned more in the same time (docs/quality.md).
"""

from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Any

from ...registry import Registry, option
from .downsample import DOWNSAMPLERS
from .mixing import MIXINGS
from .shape import BaseShape

TAP_STORAGES: Registry[int | None] = Registry("tap_storage")
TAP_STORAGES.add("full", None, "as they are")
TAP_STORAGES.add("int8", 8, "in 8 bits")
TAP_STORAGES.add("int4", 4, "in 4 bits")
COMPUTE_DTYPES: Registry[str | None] = Registry("compute_dtype")
COMPUTE_DTYPES.add("auto", None, "that of the base's hidden states")
for _name in ("float32", "bfloat16", "float16"):
    COMPUTE_DTYPES.add(_name, _name)
LARGEST_SIZE = 2**20


@dataclass
class NetworkSettings:
    """Settings of a side network.

    Raises:
        ValueError: when a value is out of its range or contradicts another, naming the field.
    """

    reduction_factor: int = option(
        4, "The side network is hidden_size / reduction_factor wide. A divisor, not a rank: smaller learns more and "
        "costs more. It must divide the hidden size.", least=2,
    )  # fmt: skip
    downsample: str = option("linear", "How a hidden state of the base enters the side network.", DOWNSAMPLERS)
    downsample_rank: int = option(16, "Inner width of the adapter, lora and projection down-samplers.", least=1)
    downsample_norm: bool = option(True, "Normalize every down-sampled hidden state, as the authors' code does.")
    center_taps: bool = option(
        True, "Subtract from every tapped hidden state the mean of the positions that the loss reads, measured in the "
        "first training step and saved with the adapter. Little for language modelling, much for classifiers.",
    )  # fmt: skip
    tap_every: int = option(
        3, "Tap every n-th block, counted from the last one, by a side block of its own. The paper taps all, with 1.",
        least=1,
    )  # fmt: skip
    layers_to_transform: list[int] | int | None = option(
        None, "Indices of the base blocks that are tapped, instead of tap_every."
    )
    side_attention: bool = option(
        False, "Whether side blocks attend. Without, they read at each position what the base has gathered there, and "
        "need no mask and no keys and values in generation.",
    )  # fmt: skip
    num_side_heads: int | None = option(
        None, "Attention heads of a side block. Default: heads of size 64 where the width allows it.", least=1
    )
    side_dropout: float = option(0.0, "Dropout on the output of the side blocks' attention and MLP.")
    mixing: str = option("additive", "Parametrisation of the gates.", MIXINGS)
    compute_dtype: str = option(
        "auto", "Autocast dtype of the side network; its weights are always float32.", COMPUTE_DTYPES
    )
    tap_storage: str = option(
        "full", "How training saves the hidden states that a learned down-sampler needs for backward. With int8 and "
        "int4 the down-samplers' gradients become inexact, nothing else.", TAP_STORAGES,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices, least = getattr(self, one.name), one.metadata.get("choices"), one.metadata.get("least")
            if choices is not None:
                choices.check(value)
            elif isinstance(one.default, bool):
                check_bool(one.name, value)
            elif least is not None and not (value is None and one.default is None):
                check_integer(one.name, value, least)
        if self.num_side_heads is not None and not self.side_attention:
            raise ValueError(
                f"num_side_heads is {self.num_side_heads}, but side blocks do not attend; set side_attention to true, "
                "or leave it unset."
            )
        if self.tap_storage != "full" and not DOWNSAMPLERS[self.downsample].learned:
            learned = ", ".join(name for name, choice in DOWNSAMPLERS.items() if choice.learned)
            raise ValueError(
                f"tap_storage is {self.tap_storage}, but {self.downsample} saves no hidden state for backward; leave "
                f"it at full, or choose downsample from {learned}."
            )
        dropout = self.side_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"side_dropout is {short(dropout)}; give a probability from 0 up to, not including, 1.")
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        if self.layers_to_transform is not None:
            _check_layers(self.layers_to_transform)

    def layers(self, shape: BaseShape) -> list[int]:
        """Indices of the tapped blocks, ascending."""
        depth = shape.num_layers
        if self.layers_to_transform is None:
            return sorted(range(depth - 1, -1, -self.tap_every))
        assert not isinstance(self.layers_to_transform, int)
        layers = sorted(self.layers_to_transform)
        if layers[-1] >= depth:
            raise ValueError(f"layers_to_transform names block {layers[-1]}, but the base has blocks 0 to {depth - 1}.")
        return layers

    def width(self, shape: BaseShape) -> int:
        """Width d/r of the side network."""
        # Rotary positions turn pairs of channels.
        size, paired = shape.hidden_size, shape.rotary and self.side_attention
        usable = [r for r in range(2, size // 8 + 1) if size % r == 0 and not (paired and (size // r) % 2)]
        if self.reduction_factor not in usable:
            raise ValueError(
                f"reduction_factor is {self.reduction_factor}, which leaves no usable side width of a hidden size of "
                f"{size}; choose one of {', '.join(map(str, usable))}."
            )
        return size // self.reduction_factor

    def heads(self, shape: BaseShape) -> int | None:
        """Number of attention heads of a side block, if it attends."""
        if not self.side_attention:
            return None
        width = self.width(shape)
        heads = self.num_side_heads or default_num_heads(width)
        if width % heads or (shape.rotary and (width // heads) % 2):
            raise ValueError(
                f"num_side_heads is {heads}, which does not split the side width of {width} into equal"
                f"{' even' if shape.rotary else ''} sizes; leave it unset for {default_num_heads(width)}."
            )
        return heads


def default_num_heads(width: int) -> int:
    """The most heads that divide `width` into even sizes of at least 64; 1 if there are none."""
    return next((heads for heads in range(width // 64, 1, -1) if width % heads == 0 and (width // heads) % 2 == 0), 1)


def check_bool(name: str, value: object) -> None:
    """Check that the field `name` is a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {short(value)}; give true or false.")


def check_integer(name: str, value: object, least: int) -> None:
    """Check that the field `name` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {short(value)}; give an integer of at least {least}.")
    if value > LARGEST_SIZE:
        raise ValueError(f"{name} is {short(value)}; give an integer of at most {LARGEST_SIZE}.")


def _check_layers(layers: Any) -> None:
    listed = isinstance(layers, (list, tuple, range)) and 0 < len(layers) <= LARGEST_SIZE
    integers = listed and all(type(index) is int and 0 <= index < LARGEST_SIZE for index in layers)
    if not integers or len(set(layers)) != len(layers):
        raise ValueError(f"layers_to_transform is {short(layers)}; give distinct block indices counted from 0.")
