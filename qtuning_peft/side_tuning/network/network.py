"""The side network: taps in, one narrow block per tapped base block, a mixture with the base's final state out.

    g_0 = tap(embeddings)      g_i = block_i(gate_i(tap_i(h_i), g_(i-1)))      h = mix(f, norm(g_N))
    tap(h) = norm(down(h - c))

(QST, ACL 2024, section 3.2; down-samplers are in `downsample`, gates and mixture in `mixing`, blocks in `block`. The
center c is ours.) Each step runs as soon as its tap exists and keeps no reference to it, so a full-width hidden state
only stays alive if a learned down-sampler needs it for backward.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionInputs
from .block import SideBlock
from .downsample import DOWNSAMPLERS
from .mixing import MIXINGS
from .quantize import with_quantized_input
from .settings import COMPUTE_DTYPES, TAP_STORAGES, NetworkSettings
from .shape import BaseShape, LayerNorm


class Tap(nn.Module):
    """How a hidden state enters: minus its center, down-sampled, normalized."""

    center: Tensor | None

    def __init__(self, settings: NetworkSettings, shape: BaseShape) -> None:
        super().__init__()
        width = settings.width(shape)
        # Zero until the first step of training.
        center = torch.zeros(shape.hidden_size, dtype=torch.float32) if settings.center_taps else None
        self.register_buffer("center", center)
        self.down = DOWNSAMPLERS[settings.downsample].make(shape.hidden_size, width, settings.downsample_rank)
        self.bits = TAP_STORAGES[settings.tap_storage]
        self.norm: nn.Module = nn.Identity()
        if settings.downsample_norm and MIXINGS[settings.mixing].layer_norm_taps:
            self.norm = LayerNorm(width, dtype=torch.float32)
        elif settings.downsample_norm:
            self.norm = shape.make_norm(width)

    def narrow(self, hidden_states: Tensor) -> Tensor:
        """Center and down-sample (batch, length, d) to (batch, length, d/r)."""
        if self.center is not None:
            hidden_states = (hidden_states - self.center).to(hidden_states.dtype)
        if self.bits is not None and self.training and torch.is_grad_enabled():
            return with_quantized_input(self.down, hidden_states, self.bits)
        return self.down(hidden_states)


class SideNetwork(nn.Module):
    """The trained part of a side-tuned model. Call `begin`, then `step` for every tapped block, then `finish`.

    Attributes:
        layers: Indices of the tapped blocks, ascending.
        head_dim: Size of attention heads; `None` where side blocks do not attend.

    Raises:
        ValueError: when `reduction_factor`, `num_side_heads` or `layers_to_transform` does not fit the base.
    """

    # transformers' `gradient_checkpointing_enable` sets this on every module that has it.
    gradient_checkpointing = False

    def __init__(self, settings: NetworkSettings, shape: BaseShape) -> None:
        super().__init__()
        self.layers = settings.layers(shape)
        width, heads = settings.width(shape), settings.heads(shape)
        self.head_dim = None if heads is None else width // heads
        self.num_base_layers = shape.num_layers
        self.kinds: list[str] | None = getattr(shape.config, "layer_types", None)
        compute_dtype = COMPUTE_DTYPES[settings.compute_dtype]
        self.compute_dtype: torch.dtype | None = None if compute_dtype is None else getattr(torch, compute_dtype)
        # Whether training keeps hidden states as they are until backward.
        self.saves_taps = DOWNSAMPLERS[settings.downsample].learned and TAP_STORAGES[settings.tap_storage] is None
        self._centered = not settings.center_taps
        mixing = MIXINGS[settings.mixing]
        self.embedding_tap = Tap(settings, shape)
        self.taps = nn.ModuleList(Tap(settings, shape) for _ in self.layers)
        self.gates = nn.ModuleList(mixing.input_gate(width) for _ in self.layers)
        self.blocks = nn.ModuleList(SideBlock(shape, width, heads, settings.side_dropout) for _ in self.layers)
        self.norm = shape.make_norm(width)
        self.mix = mixing(width, shape)

    @property
    def attends(self) -> bool:
        """Whether side blocks attend: they then need positions, masks, and keys and values of earlier tokens."""
        return self.head_dim is not None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.mix.up_proj.weight.dtype

    def begin(self, embeddings: Tensor) -> Tensor:
        """Side state from the embeddings: (batch, length, d) to (batch, length, d/r)."""
        narrow, device_type = self.embedding_tap.narrow(embeddings), embeddings.device.type
        # The residual stream has the dtype that is computed in, as in a base of that dtype.
        autocast = torch.is_autocast_enabled(device_type)
        return self.embedding_tap.norm(narrow.to(torch.get_autocast_dtype(device_type) if autocast else self.dtype))

    def step(self, index: int, hidden_states: Tensor, side: Tensor, inputs: AttentionInputs | None = None) -> Tensor:
        """Run side block `index` (among the tapped ones) on the base block's output, (batch, length, d).

        The side state goes from (batch, length, d/r) to the same; `inputs` are needed where side blocks attend.
        """
        # All that checkpointing has to save, beside the side state.
        narrow = self._tap(index).narrow(hidden_states)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # Replaying would store keys and values twice; who trains with checkpointing does not generate.
            inputs = inputs and replace(inputs, cache=None)
            # Not the reentrant kind: a pooled tap needs no gradient, which it takes for the end of the graph.
            return checkpoint(self._advance, index, narrow, side, inputs, use_reentrant=False)
        return self._advance(index, narrow, side, inputs)

    def _advance(self, index: int, narrow: Tensor, side: Tensor, inputs: AttentionInputs | None) -> Tensor:
        tap = self._tap(index).norm(narrow.to(side.dtype))  # (batch, length, d/r)
        return self.blocks[index](self.gates[index](tap, side), inputs)

    def finish(self, base: Tensor, side: Tensor) -> Tensor:
        """Mix the side state (batch, length, d/r) into the base's normed final state (batch, length, d)."""
        return self.mix(base, self.norm(side).to(base.device))

    def _tap(self, index: int) -> Tap:
        tap = self.taps[index]
        assert isinstance(tap, Tap)
        return tap

    def all_taps(self) -> list[Tap]:
        """The embeddings' tap, then those of the blocks."""
        return [self.embedding_tap, *(self._tap(index) for index in range(len(self.layers)))]

    def lacks_centers(self) -> bool:
        """Whether the taps' centers were neither measured nor loaded."""
        # Their numbers are looked at until they are there and no longer, as that waits for the device; and not in a
        # graph, which they would break: `train` looks before.
        if not self._centered and not torch.compiler.is_compiling():
            centers = [tap.center for tap in self.all_taps() if tap.center is not None and not tap.center.is_meta]
            self._centered = any(bool(center.any()) for center in centers)
        return not self._centered

    def train(self, mode: bool = True) -> "SideNetwork":
        """Enter or leave training mode; entering it brings trainable 16-bit weights back to float32.

        TRL casts every trainable parameter to bfloat16 on a 4-bit base. A gate of 0.5 in bfloat16 has steps of
        0.002 to its neighbours, so that updates at usual learning rates round to nothing.
        """
        if mode:
            self.lacks_centers()
            for parameter in self.parameters():
                if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
        super().train(mode)
        return self
