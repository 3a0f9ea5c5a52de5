"""The side network's seat in the base: the layer that takes the place of the decoder's final norm.

Its hooks let the base run exactly as it is, but without autograd and in eval mode, and hand every block's output to
the side network. No tensor of the base is ever part of the graph (QST, ACL 2024, section 3: "gradients only flow in
the side network"), whatever trainers do to the inputs: `enable_input_require_grads`, `prepare_model_for_kbit_training`
and gradient checkpointing of the base all come to nothing, because nothing is recorded between decoder and final norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from .adapter_files import check_tensors
from .block import BlockInputs, narrow_rotary
from .cache import attach_side_layers, require_same_length
from .config import SideTuningConfig
from .decoder import DecoderSpec
from .network import SideNetwork

# What attention implementations read beside the mask; the base's blocks pass them through as well.
ATTENTION_ARGUMENTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class _Pass:
    """One forward pass of the base, as the side network follows it."""

    outer_grad: bool
    network: SideNetwork | None = None
    side: Tensor | None = None
    steps: int = 0
    first_side_layer: int = 0
    rotary: tuple[Tensor, Tensor] | None = None
    rotary_source: Any = None

    def narrow_rotary(self, source: Any) -> tuple[Tensor, Tensor] | None:
        """Rotary positions for the side network's heads, made once for all blocks that share `source`."""
        if source is not self.rotary_source:
            assert self.network is not None
            self.rotary_source = source
            self.rotary = _narrow_rotary(source, self.network)
        return self.rotary


class SideTuningLayer(nn.Module, BaseTunerLayer):
    """The decoder's final norm, and one side network per adapter.

    Args:
        base_layer: The final norm.
        spec: The decoder it belongs to.
    """

    adapter_layer_names = ("qst_side_network",)
    other_param_names = ()

    base_layer: nn.Module
    qst_side_network: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, spec: DecoderSpec) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.qst_side_network = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._pass: _Pass | None = None
        self._num_base_layers = len(spec.blocks)
        self._handles: list[RemovableHandle] = []

    def update_layer(self, adapter_name: str, config: SideTuningConfig, spec: DecoderSpec) -> None:
        """Add a side network named `adapter_name`.

        Raises:
            ValueError: when `config` does not fit the base.
        """
        network = SideNetwork(config, spec)
        network.train(self.training)
        self.qst_side_network[adapter_name] = network
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The final norm of `hidden_states` (batch, length, d), mixed with the side network's output."""
        base: Tensor = self.base_layer(hidden_states, *args, **kwargs)
        current = self._pass
        if current is None or current.network is None or current.side is None:
            return base
        if current.steps != len(current.network.layers):
            raise RuntimeError(
                f"{current.steps} of {len(current.network.layers)} tapped blocks ran before the final norm; side "
                "tuning needs every block to run in every pass, without layer dropping or early exit."
            )
        # Left on: what the decoder does behind its norm (a view, a projection) is on the way to the loss.
        torch.set_grad_enabled(current.outer_grad)
        return current.network.finish(base, current.side)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is nothing in the base that a side network could be added to."""
        raise NotImplementedError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Refuse, as `merge` does."""
        raise NotImplementedError(MERGE_REFUSAL)

    def detach_from_base(self) -> None:
        """Remove the hooks, leaving the base as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: the side network is not a weight delta."""
        return False

    # -- the hooks ---------------------------------------------------------------------------------------------------

    def attach_to_base(self, spec: DecoderSpec) -> None:
        """Hook into the decoder and its blocks."""
        self._handles = [
            spec.decoder.register_forward_pre_hook(self._enter_decoder),
            spec.decoder.register_forward_hook(self._leave_decoder, always_call=True),
            spec.blocks[0].register_forward_pre_hook(self._enter_first_block, with_kwargs=True),
        ]
        for index, block in enumerate(spec.blocks):
            self._handles.append(block.register_forward_hook(_BlockHook(self, index), with_kwargs=True))

    def _enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        if getattr(decoder, "_is_replica", False):
            raise RuntimeError(
                "nn.DataParallel replicates modules in threads, which side tuning cannot follow; launch with "
                "'accelerate launch' or torchrun, or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        self._keep_base_in_eval_mode(decoder)
        self._pass = _Pass(outer_grad=torch.is_grad_enabled(), network=self._active_network())
        torch.set_grad_enabled(False)

    def _leave_decoder(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._pass is not None:
            torch.set_grad_enabled(self._pass.outer_grad)
            self._pass = None

    def _enter_first_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = self._pass
        if current is None or current.network is None:
            return
        arguments = _bind(block, args, kwargs)
        cache = _cache_in(arguments)
        if cache is not None:
            layers = current.network.layers
            current.first_side_layer = attach_side_layers(cache, self._num_base_layers, layers)
            require_same_length(cache, current.first_side_layer, layers)
        embeddings = arguments["hidden_states"].detach()  # (batch, length, d)
        with torch.set_grad_enabled(current.outer_grad):
            current.side = current.network.start(embeddings)

    def after_block(self, index: int, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Advance the side network by the output of base block `index`, if that is tapped."""
        current = self._pass
        if current is None or current.network is None or index not in current.network.layers:
            return
        assert current.side is not None
        hidden_states = (output[0] if isinstance(output, tuple) else output).detach()  # (batch, length, d)
        arguments = _bind(block, args, kwargs)
        inputs = BlockInputs(
            attention_mask=_on_device(arguments.get("attention_mask"), current.side.device),
            rotary=current.narrow_rotary(arguments.get("position_embeddings")),
            cache=_cache_in(arguments),
            cache_layer=current.first_side_layer + current.steps,
            extra={name: arguments[name] for name in ATTENTION_ARGUMENTS if arguments.get(name) is not None},
        )
        window = next((m.sliding_window for m in block.modules() if getattr(m, "sliding_window", None)), None)
        if window is not None:
            inputs.extra["sliding_window"] = window
        with torch.set_grad_enabled(current.outer_grad):
            current.side = current.network.step(current.steps, hidden_states, current.side, inputs)
        current.steps += 1

    def _active_network(self) -> SideNetwork | None:
        names = [name for name in self.active_adapters if name in self.qst_side_network]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"Adapters {', '.join(names)} are active together; side networks run one at a time.")
        network = self.qst_side_network[names[0]]
        assert isinstance(network, SideNetwork)
        return network

    def _keep_base_in_eval_mode(self, decoder: nn.Module) -> None:
        """Undo `model.train()` for the base: dropout there would only make the side network's inputs noisy."""
        if decoder.training:
            side_networks_train = self.training
            decoder.eval()
            self.train(side_networks_train)
            self.base_layer.eval()

    # -- loading -----------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Here, before any tensor of this layer is copied, on every way of loading.
        check_tensors(self.qst_side_network, state_dict, f"{prefix}qst_side_network.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the side network to the base's device; its dtype stays float32 on a 16-bit base."""
        if adapter_name in self.qst_side_network:
            network = self.qst_side_network[adapter_name]
            if not any(parameter.is_meta for parameter in network.parameters()):
                network.to(device or self._base_device())

    def _base_device(self) -> torch.device:
        return next(self.base_layer.parameters(), torch.empty(0)).device


class _BlockHook:
    """Forward hook of one block; an object, so that a model with hooks can be copied and pickled."""

    def __init__(self, layer: SideTuningLayer, index: int) -> None:
        self.layer = layer
        self.index = index

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.layer.after_block(self.index, block, args, kwargs, output)


MERGE_REFUSAL = (
    "A side network is not a weight delta and cannot be merged into the base; keep the adapter beside it, or call "
    "unload() to get the base back."
)


@lru_cache(maxsize=256)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _bind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block's forward by name; families differ in what they pass by position."""
    bound = _signature(type(block).forward).bind_partial(block, *args, **kwargs).arguments
    named = {name: value for name, value in bound.items() if name not in ("kwargs", "self")}
    return named | bound.get("kwargs", {})


def _cache_in(arguments: dict[str, Any]) -> Cache | None:
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def _narrow_rotary(source: Any, network: SideNetwork) -> tuple[Tensor, Tensor] | None:
    if source is None:
        return None
    if not (isinstance(source, tuple) and len(source) == 2 and source[0].dim() == 3):
        raise NotImplementedError(
            "The base passes rotary positions in a form other than (cosine, sine) of (batch, length, size); side "
            "tuning does not support this architecture yet."
        )
    cos, sin = (values.to(network.device) for values in source)
    return narrow_rotary(cos, sin, network.head_dim)


def _on_device(mask: Any, device: torch.device) -> Any:
    return mask.to(device) if isinstance(mask, Tensor) else mask
