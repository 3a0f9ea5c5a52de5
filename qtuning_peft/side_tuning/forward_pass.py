"""Following a forward pass of the base: what the side network reads from the decoder and its blocks.

The decoder runs as it is, but without autograd. That is done around its `forward` and not by hooks, because torch runs
no hook, not even an `always_call` one, when a pass ends in KeyboardInterrupt: autograd would stay off in the process.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from .block import ATTENTION_ARGUMENTS, BlockInputs, narrow_rotary
from .network import SideNetwork
from .shared_prefix import is_prefix, with_prefix
from .tap_storage import RunBase, TapReader, TapStorage

if TYPE_CHECKING:
    from .base_states import BaseStates
    from .layer import SideTuningLayer


@dataclass
class ForwardPass:
    """One pass of the base.

    Attributes:
        outer_grad: Whether the caller records gradients.
        network: The active side network, if any.
        side: Its state, (batch, length, d/r), once the first block was entered.
        steps: Number of side blocks that have run.
        first_side_layer: Index of its first layer in the key-value cache.
        finished: Whether the mixture was made.
        recording: Where the base's states are kept instead of being handed to the side network, if anywhere.
    """

    outer_grad: bool
    network: SideNetwork | None = None
    side: Tensor | None = None
    steps: int = 0
    first_side_layer: int = 0
    finished: bool = False
    recording: BaseStates | TapReader | None = None
    run_base: RunBase | None = None
    taps: TapStorage = field(default_factory=TapStorage)
    rotary: tuple[Tensor, Tensor] | None = None
    rotary_source: Any = None
    masks: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def block_inputs(self, block: nn.Module, arguments: dict[str, Any]) -> BlockInputs:
        """What the base handed to `block`, for the side block beside it."""
        assert self.side is not None
        assert self.network is not None
        if not self.network.attends:
            return BlockInputs()
        inputs = BlockInputs(
            attention_mask=_on_device(arguments.get("attention_mask"), self.side.device),
            rotary=self._narrow_rotary(arguments.get("position_embeddings")),
            cache=cache_in(arguments),
            cache_layer=self.first_side_layer + self.steps,
            masks=self.masks,
            extra={name: arguments[name] for name in ATTENTION_ARGUMENTS if arguments.get(name) is not None},
        )
        window = _sliding_window(block)
        if window is not None:
            inputs.extra["sliding_window"] = window
        return inputs

    def _narrow_rotary(self, source: Any) -> tuple[Tensor, Tensor] | None:
        # Made once for all blocks that share the base's: autograd keeps it for each of them.
        if source is not self.rotary_source:
            assert self.network is not None
            assert self.network.head_dim is not None
            assert self.side is not None
            if not (isinstance(source, tuple) and len(source) == 2 and source[0].dim() == 3):
                raise NotImplementedError(
                    "The base passes rotary positions in a form other than (cosine, sine) of (batch, length, size); "
                    "side tuning does not support this architecture yet."
                )
            cos, sin = (values.to(self.side.device) for values in source)
            self.rotary = narrow_rotary(cos, sin, self.network.head_dim)
            self.rotary_source = source
        return self.rotary


class CurrentPass(threading.local):
    """The pass the calling thread is in, and where it keeps the base's states; servers run several on one model."""

    value: ForwardPass | None = None
    recording: BaseStates | TapReader | None = None
    # Counted when asked for, as that waits for the device.
    unread: Callable[[], int] | None = None

    def __reduce__(self) -> tuple[type[CurrentPass], tuple[()]]:
        # A copied or pickled model is in no pass.
        return CurrentPass, ()


class DecoderForward:
    """Stands in for a decoder's `forward`; an object, so that the model can be copied and pickled."""

    def __init__(self, layer: SideTuningLayer, decoder: nn.Module) -> None:
        self.layer = layer
        self.decoder = decoder
        # Others replace `forward` too: accelerate's hooks, for one.
        self.replaced: Callable[..., Any] | None = vars(decoder).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder as its own `forward` would, followed by `layer`."""
        input_ids: Any = kwargs.get("input_ids", args[0] if args else None)
        # Kept states are for training: generation has keys and values to store.
        if self.layer.training:
            states = self.layer.take_waiting(input_ids, kwargs)
            if states is not None:
                return self.layer.replay(states, self._again(args, kwargs) if torch.is_grad_enabled() else None)
        prefix = self.layer.prefix_of(input_ids, kwargs) if len(args) < 2 else None
        if prefix is None:
            return self._followed(args, kwargs)
        cache, hidden_states = prefix.computed(self.layer, self._run, input_ids.device)
        rest = {name: prefix.without(kwargs[name]) if name == "position_ids" else kwargs[name] for name in kwargs}
        rest |= {"input_ids": prefix.without(input_ids), "past_key_values": cache}
        return with_prefix(hidden_states, self._followed((), rest))

    def _followed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run_base = self._again(args, kwargs) if torch.is_grad_enabled() else None
        kept = self.layer.kept_for(args, kwargs)
        if kept is not None:
            states = kept.states(self.layer, lambda: self._run(*args, **kwargs), inputs_of(args, kwargs))
            if states is not None:
                return self.layer.replay(states, run_base)
        with self.layer.following(self.decoder, run_base):
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.decoder).forward(self.decoder, *args, **kwargs)

    def _again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RunBase:
        """Runs the base over the same input once more, under the autocast of now."""
        given_tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        # Not of the weights: off-loaded ones are nowhere.
        device_type = next(given_tensors, torch.empty(0)).device.type
        cache = kwargs.get("past_key_values")
        # A shared prefix is as it was; other caches have been filled since.
        shared = is_prefix(cache)
        continued = isinstance(cache, Cache) and cache.get_seq_length() > 0 and not shared
        autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

        def run_base(reader: TapReader) -> None:
            if continued:
                raise RuntimeError(
                    "tap_storage is recompute, and the pass continued one whose keys and values were given in "
                    "past_key_values; train without a cache, or set tap_storage to full."
                )
            given = {**kwargs, "use_cache": False, "past_key_values": cache if shared else None}
            on, dtype = autocast
            with (
                torch.no_grad(),
                torch.autocast(device_type, dtype=dtype, enabled=on),
                self.layer.recording(reader),
                self.layer.following(self.decoder),
            ):
                self._run(*args, **given)

        return run_base

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.replaced or type(self.decoder).forward.__get__(self.decoder))

    def restore(self) -> None:
        """Give the decoder its own `forward` back, unless somebody has wrapped this one since."""
        if vars(self.decoder).get("forward") is self:
            if self.replaced is None:
                del self.decoder.forward
            else:
                self.decoder.forward = self.replaced


class BlockHook:
    """Forward hook of one block; an object, for the same reason."""

    def __init__(self, layer: SideTuningLayer, index: int) -> None:
        self.layer = layer
        self.index = index

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hand the block's output to the layer."""
        self.layer.after_block(self.index, block, args, kwargs, output)


@lru_cache(maxsize=256)
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


# Looked for in every block at every step otherwise, which generation would notice.
_WINDOWS: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def _sliding_window(block: nn.Module) -> int | None:
    if block not in _WINDOWS:
        found: Any = (getattr(module, "sliding_window", None) for module in block.modules())
        _WINDOWS[block] = next(filter(None, found), None)
    return _WINDOWS[block]


def bind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block's forward by name, the hidden states first; families pass different ones by position."""
    names = _positional(type(block).forward)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given if args else {names[0]: given.pop(names[0]), **given}


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's arguments by name, of which at most the token ids are given by position."""
    return {"input_ids": args[0], **kwargs} if args else kwargs


def cache_in(arguments: dict[str, Any]) -> Cache | None:
    """The key-value cache among a block's arguments."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def _on_device(mask: Any, device: torch.device) -> Any:
    return mask.to(device) if isinstance(mask, Tensor) else mask
