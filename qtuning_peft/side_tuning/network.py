"""The side network: taps in, one narrow block per tapped base block, a mixture with the base's final state out.

    g_0 = down(embeddings)      g_i = block_i(gate_i(down_i(h_i), g_(i-1)))      h = mix(f, norm(g_N))

(QST, ACL 2024, section 3.2; gates are in `mixing`, what is taken off the taps in `centering`.) Each step runs as soon
as its tap exists and keeps no reference to it, so a full-width hidden state only stays alive if a learned down-sampler
needs it for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import BlockInputs, LayerNorm, SideBlock, default_num_heads, make_norm
from .centering import mean_where_read
from .config import LEARNED, SideTuningConfig
from .decoder import DecoderSpec
from .downsample import make_downsample
from .mixing import InputGate, OutputMix
from .tap_storage import RunBase, TapStorage, make_tap_storage


class Tap(nn.Module):
    """A down-sampler, the center of what enters it, and the norm behind it."""

    center: Tensor | None

    def __init__(self, config: SideTuningConfig, spec: DecoderSpec, width: int) -> None:
        super().__init__()
        # Zero until the first pass of training.
        center = torch.zeros(spec.hidden_size, dtype=torch.float32) if config.center_taps else None
        self.register_buffer("center", center)
        self.down = make_downsample(config, spec.hidden_size)
        self.norm = self._make_norm(config, spec, width) if config.downsample_norm else nn.Identity()

    @staticmethod
    def _make_norm(config: SideTuningConfig, spec: DecoderSpec, width: int) -> nn.Module:
        # The authors' code has a LayerNorm here whatever norm the base has.
        return LayerNorm(width, dtype=torch.float32) if config.mixing == "reference" else make_norm(spec, width)

    def centered(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states` (batch, length, d) without what they have in common."""
        return hidden_states if self.center is None else (hidden_states - self.center).to(hidden_states.dtype)

    def normed(self, narrow: Tensor, dtype: torch.dtype) -> Tensor:
        """Norm of what the down-sampler gave, in `dtype`."""
        return self.norm(narrow.to(dtype))


class SideNetwork(nn.Module):
    """The trained part of a side-tuned model.

    Args:
        config: What to build.
        spec: The base's dimensions.

    Raises:
        ValueError: when `r`, `num_side_heads` or `layers_to_transform` does not fit the base.
    """

    # transformers' `gradient_checkpointing_enable` sets this on every module that has it.
    gradient_checkpointing = False

    def __init__(self, config: SideTuningConfig, spec: DecoderSpec) -> None:
        super().__init__()
        self.layers = tapped_layers(config, spec)
        width = side_width(config, spec)
        heads = side_heads(config, spec, width)
        # Of attention heads; none where side blocks do not attend.
        self.head_dim = None if heads is None else width // heads
        self.compute_dtype = None if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype)
        self.tap_storage = config.tap_storage
        self._holds_taps = config.downsample in LEARNED and config.tap_storage == "full"
        self._centered = not config.center_taps
        self.embedding_tap = Tap(config, spec, width)
        self.taps = nn.ModuleList(Tap(config, spec, width) for _ in self.layers)
        self.gates = nn.ModuleList(InputGate(config.mixing, width) for _ in self.layers)
        self.blocks = nn.ModuleList(
            SideBlock(spec, width, config.reduction_factor, heads, config.side_dropout) for _ in self.layers
        )
        self.norm = make_norm(spec, width)
        self.mix = OutputMix(config.mixing, width, spec.hidden_size, swapped=self._swapped(config, spec))

    @staticmethod
    def _swapped(config: SideTuningConfig, spec: DecoderSpec) -> bool:
        """The authors mix their LayerNorm family (OPT) the other way round than their RMSNorm family (Llama)."""
        return config.mixing == "reference" and spec.centered_norm

    @property
    def attends(self) -> bool:
        """Whether side blocks attend: they then need positions, masks, and keys and values of what went before."""
        return self.head_dim is not None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.mix.up_proj.weight.dtype

    def train(self, mode: bool = True) -> SideNetwork:
        """Enter or leave training mode; entering it brings trainable 16-bit weights back to float32.

        TRL casts every trainable parameter to bfloat16 on a 4-bit base. A gate of 0.5 in bfloat16 has steps of
        0.002 to its neighbours, so that updates at usual learning rates round to nothing.
        """
        if mode:
            for parameter in self._rounded_parameters():
                parameter.data = parameter.data.float()
        super().train(mode)
        return self

    def _rounded_parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in self.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16))

    def autocast(self, hidden_states: Tensor) -> AbstractContextManager[None]:
        """Autocast to the configured dtype, or to that of 16-bit hidden states; else leave the caller's setting."""
        dtype = self.compute_dtype or hidden_states.dtype
        if self.compute_dtype is None and dtype.itemsize != 2:
            return nullcontext()
        device_type = self._device_for(hidden_states).type
        if device_type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise ValueError(
                "compute_dtype is bfloat16, which this GPU lacks; set compute_dtype to float16 or float32."
            )
        return torch.autocast(device_type, dtype=dtype, enabled=dtype.itemsize == 2)

    def make_tap_storage(self, run_base: RunBase | None) -> TapStorage:
        """How taps of one pass are held for backward; see `tap_storage`."""
        training = self.training and torch.is_grad_enabled()
        downs = [tap.down for tap in self._every_tap()]
        taps = make_tap_storage(self.tap_storage, downs, self._centers(), run_base, training)
        taps.seen = [] if training and self._lacks_centers() else None
        return taps

    def _centers(self) -> list[Tensor]:
        return [tap.center for tap in self._every_tap() if tap.center is not None]

    def _lacks_centers(self) -> bool:
        """Whether the taps' centers were neither measured nor loaded."""
        # Their numbers are looked at until they are there and no longer, as that waits for the device.
        self._centered = self._centered or any(bool(center.any()) for center in self._centers())
        return not self._centered

    def _center(self, seen: list[Tensor], gradient: Tensor) -> None:
        """Measure the centers from the hidden states and the gradient of a first pass."""
        means = mean_where_read(seen, gradient) if self._lacks_centers() else None
        seen.clear()
        if means is not None:
            for center, mean in zip(self._centers(), means, strict=True):
                center.copy_(mean)

    def start(self, embeddings: Tensor, taps: TapStorage) -> Tensor:
        """Side state from the embeddings: (batch, length, d) to (batch, length, d/r)."""
        with self.autocast(embeddings):
            narrow = self._narrow(0, self.embedding_tap, embeddings, taps)
            return self.embedding_tap.normed(narrow, self._stream_dtype(embeddings))

    def step(self, index: int, hidden_states: Tensor, side: Tensor, inputs: BlockInputs, taps: TapStorage) -> Tensor:
        """Run side block `index`.

        Args:
            index: Position among the tapped blocks.
            hidden_states: The base block's output, (batch, length, d).
            side: State of the side network, (batch, length, d/r).
            inputs: Mask, positions and cache of the base's block.
            taps: From `make_tap_storage`.

        Returns:
            The next state of the side network, (batch, length, d/r).
        """
        with self.autocast(hidden_states):
            # All that checkpointing has to hold, beside the side state.
            narrow = self._narrow(index + 1, self._tap(index), hidden_states, taps)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                # Replaying would store keys and values twice; who trains with checkpointing does not generate.
                inputs = replace(inputs, cache=None)
                # Not the reentrant kind: a pooled tap needs no gradient, which it takes for the end of the graph.
                return checkpoint(self._advance, index, narrow, side, inputs, use_reentrant=False)
            return self._advance(index, narrow, side, inputs)

    def _narrow(self, index: int, tap: Tap, hidden_states: Tensor, taps: TapStorage) -> Tensor:
        states = self._received(hidden_states)
        if taps.seen is not None:
            # Where training holds no taps, its first pass must not either.
            taps.seen.append(states if self._holds_taps else states.cpu())
        return taps.narrow(index, tap.down, tap.centered(states))

    def _advance(self, index: int, narrow: Tensor, side: Tensor, inputs: BlockInputs) -> Tensor:
        tap = self._tap(index).normed(narrow, side.dtype)
        return self.blocks[index](self.gates[index](tap, side), inputs)

    def _tap(self, index: int) -> Tap:
        tap = self.taps[index]
        assert isinstance(tap, Tap)
        return tap

    def _every_tap(self) -> list[Tap]:
        return [self.embedding_tap, *(self._tap(index) for index in range(len(self.layers)))]

    def finish(self, base: Tensor, side: Tensor, taps: TapStorage) -> Tensor:
        """Mix the side state (batch, length, d/r) into the base's normed final state (batch, length, d)."""
        with self.autocast(base):
            mixed: Tensor = self.mix(base, self.norm(side).to(base.device))
        if taps.seen is not None and mixed.requires_grad:
            mixed.register_hook(partial(self._center, taps.seen))
        return mixed

    def _received(self, hidden_states: Tensor) -> Tensor:
        """A tap on the side network's device; in its dtype too, unless autocast takes care of that."""
        hidden_states = hidden_states.to(self._device_for(hidden_states))
        return hidden_states if torch.is_autocast_enabled(hidden_states.device.type) else hidden_states.to(self.dtype)

    def _stream_dtype(self, hidden_states: Tensor) -> torch.dtype:
        """Dtype of the side network's residual stream: what autocast computes in, as in a base of that dtype."""
        device_type = self._device_for(hidden_states).type
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else self.dtype

    def _device_for(self, hidden_states: Tensor) -> torch.device:
        """Where the weights are; off-loaded ones come to the hidden states."""
        weight = self.mix.up_proj.weight
        return hidden_states.device if weight.is_meta else weight.device


def tapped_layers(config: SideTuningConfig, spec: DecoderSpec) -> list[int]:
    """Indices of the tapped blocks, ascending.

    Raises:
        ValueError: when `layers_to_transform` names a block that the base does not have.
    """
    depth = len(spec.blocks)
    if config.layers_to_transform is None:
        return sorted(range(depth - 1, -1, -config.tap_every))
    layers = sorted(
        [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    )
    if layers[-1] >= depth:
        raise ValueError(f"layers_to_transform names block {layers[-1]}, but the base has blocks 0 to {depth - 1}.")
    return layers


def side_width(config: SideTuningConfig, spec: DecoderSpec) -> int:
    """Width d/r of the side network.

    Raises:
        ValueError: when `r` does not divide the hidden size, or leaves an odd width to attention with rotary positions.
    """
    usable = [r for r in range(2, spec.hidden_size // 8 + 1) if _fits(config, spec, r)]
    if config.reduction_factor not in usable:
        raise ValueError(
            f"reduction_factor is {config.reduction_factor}, which leaves no usable side width of a "
            f"hidden size of {spec.hidden_size}; "
            f"choose one of {', '.join(map(str, usable))}."
        )
    return spec.hidden_size // config.reduction_factor


def _fits(config: SideTuningConfig, spec: DecoderSpec, r: int) -> bool:
    # Rotary positions turn pairs of channels.
    paired = spec.rotary and config.side_attention
    return spec.hidden_size % r == 0 and not (paired and (spec.hidden_size // r) % 2)


def side_heads(config: SideTuningConfig, spec: DecoderSpec, width: int) -> int | None:
    """Number of attention heads of a side block, if it attends.

    Raises:
        ValueError: when `num_side_heads` does not divide the side width, or leaves odd heads with rotary positions.
    """
    if not config.side_attention:
        return None
    heads = config.num_side_heads or default_num_heads(width)
    if width % heads or (spec.rotary and (width // heads) % 2):
        raise ValueError(
            f"num_side_heads is {heads}, which does not split the side width of {width} into equal"
            f"{' even' if spec.rotary else ''} sizes; leave it unset for {default_num_heads(width)}."
        )
    return heads
