"""The listener that runs the side network beside one pass of the base: on its device, in its dtype, step by step."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..network import SideNetwork, UnsupportedBaseError
from ..network.attention import AttentionPass
from .fit import CenterFit
from .follower import BlockCall


class SideRun:
    """Runs a side network; see [`Listener`]. A key-value cache is marked with its name, `adapter`."""

    def __init__(self, network: SideNetwork, adapter: str) -> None:
        self.network = network
        self.layers: Collection[int] = network.layers
        self.side: Tensor | None = None  # (batch, length, d/r)
        self.steps = 0
        self.dtype = torch.float32  # of this pass
        self.centers = CenterFit.of(network)
        self.attention: AttentionPass | None = None
        if network.head_dim is not None:
            self.attention = AttentionPass(
                network.layers, network.num_base_layers, network.head_dim, adapter, network.kinds
            )

    def begin(self, embeddings: Tensor, call: BlockCall) -> None:
        """Start from the embeddings."""
        if embeddings.dim() != 3:
            raise UnsupportedBaseError(
                f"The base's blocks work on {embeddings.dim()}-dimensional states instead of (batch, length, width), "
                "and nothing says which part of them to read; side tuning does not support this architecture yet."
            )
        if self.attention is not None:
            self.attention.begin(call.arguments)
        # Once for all: some bases keep their residual stream in float32 from the first block on (Mamba).
        self.dtype = self.network.compute_dtype or embeddings.dtype
        with self._autocast(embeddings):
            self.side = self.network.begin(self._received(embeddings))

    def block(self, index: int, hidden_states: Tensor, call: BlockCall) -> None:
        """Advance by one side block."""
        assert self.side is not None
        inputs = None
        if self.attention is not None:
            inputs = self.attention.inputs(self.steps, call.block, call.arguments, self.side.device)
        with self._autocast(hidden_states):
            self.side = self.network.step(self.steps, self._received(hidden_states), self.side, inputs)
        self.steps += 1

    def end(self, normed: Tensor) -> Tensor:
        """Mix; an `UnsupportedBaseError` when not every tapped block has run."""
        assert self.side is not None
        if self.steps != len(self.layers):
            raise UnsupportedBaseError(
                f"{self.steps} of {len(self.layers)} tapped blocks ran before the final norm; choose blocks that run "
                "in every pass with layers_to_transform, and leave out layer dropping and early exit."
            )
        with self._autocast(normed):
            mixed = self.network.finish(normed, self.side)
        if self.centers is not None:
            self.centers.when_read(mixed)
        return mixed

    def _received(self, hidden_states: Tensor) -> Tensor:
        """A tap on the side network's device; in its dtype too, unless autocast takes care of that."""
        hidden_states = hidden_states.to(self._device_for(hidden_states))
        if not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(self.network.dtype)
        if self.centers is not None:
            self.centers.see(hidden_states)
        return hidden_states

    @contextmanager
    def _autocast(self, hidden_states: Tensor) -> Iterator[None]:
        """Autocast to the configured dtype, or to that of 16-bit embeddings; else leave the caller's setting."""
        dtype = self.dtype
        if self.network.compute_dtype is None and dtype.itemsize != 2:
            yield
            return
        device_type = self._device_for(hidden_states).type
        if device_type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise ValueError(
                "compute_dtype is bfloat16, which this GPU lacks; set compute_dtype to float16 or float32."
            )
        with torch.autocast(device_type, dtype=dtype, enabled=dtype.itemsize == 2):
            yield

    def _device_for(self, hidden_states: Tensor) -> torch.device:
        """Where the weights are; off-loaded ones come to the hidden states."""
        weight = self.network.mix.up_proj.weight
        return hidden_states.device if weight.is_meta else weight.device
