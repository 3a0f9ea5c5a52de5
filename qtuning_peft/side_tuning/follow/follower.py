"""Following the base: a listener is notified of what passes through its decoder, and nothing of it enters the graph.

    begin(embeddings)      block(i, output of block i) [-> changed output]      end(final norm's output) -> mixture

(QST, ACL 2024, section 3: "gradients only flow in the side network".) The decoder runs as it is, in eval mode and
without autograd, which `Follower.run` switches off around its `forward`. Hooks could not: torch runs none of them, not
even an `always_call` one, when a pass ends in KeyboardInterrupt, and autograd would stay off in the process.
"""

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..network import SideNetwork, UnsupportedBaseError


class BlockCall(NamedTuple):
    """A block of the base, and its arguments by name, the hidden states first; `None` and empty in a replay."""

    block: nn.Module | None = None
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never changed; a NamedTuple takes no default factory)


class Listener(Protocol):
    """Is notified of one pass of the base, with the caller's grad mode.

    Attributes:
        layers: Indices of the blocks it wants to be notified of.
    """

    layers: Collection[int]

    def begin(self, embeddings: Tensor, call: BlockCall) -> None:
        """The first block is entered with `embeddings` (batch, length, d)."""

    def block(self, index: int, hidden_states: Tensor, call: BlockCall) -> Tensor | None:
        """Block `index` has returned `hidden_states` (batch, length, d); a tensor takes their place in the base."""

    def end(self, normed: Tensor) -> Tensor:
        """The final norm has returned `normed` (batch, length, d); the result is what the decoder goes on with."""


class Host(Protocol):
    """What a follower asks of the layer that holds the side networks."""

    training: bool

    def active_network(self) -> SideNetwork | None:
        """The side network that runs beside the base now, if any."""

    def make_listener(self) -> Listener | None:
        """Who listens to the next pass."""

    def listener_of(self, name: str) -> Listener:
        """The side network `name`, as a listener."""

    def prepare_base(self, decoder: nn.Module) -> None:
        """Called before every pass."""


class Current:
    """The pass that a thread is in."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.outer_grad = True
        self.began = self.ended = False
        # Instead of the host's listener.
        self.recorder: Listener | None = None
        # Of the rows of a mixed batch.
        self.adapter_names: Sequence[str] | None = None


class Threads(threading.local):
    """Of the calling thread; servers run several on one model.

    It is never written to: a compiled frame forgets what it has written to a `threading.local` where its graph breaks.
    """

    def __init__(self) -> None:
        self.current = Current()

    def __reduce__(self) -> "tuple[type[Threads], tuple[()]]":
        # A copied or pickled model is in no pass.
        return Threads, ()


class Follower:
    """Stands in for a decoder's `forward`; an object, so that the model can be copied and pickled.

    Attributes:
        stream: Index of the stream that is followed, where blocks hand on several (Gemma 3n).
        intercept: Called instead of a plain pass, as `intercept(follower, *args, **kwargs)`, if it is set.
    """

    def __init__(self, host: Host, decoder: nn.Module, blocks: nn.ModuleList, stream: int | None = None) -> None:
        self.host, self.decoder, self.stream = host, decoder, stream
        self.threads = Threads()
        self.intercept: Callable[..., Any] | None = None
        # Others replace `forward` too: accelerate's hooks, for one.
        self.replaced: Callable[..., Any] | None = vars(decoder).get("forward")
        decoder.forward = self
        self.handles: list[RemovableHandle] = [
            decoder.register_forward_pre_hook(_refuse_replica),
            blocks[0].register_forward_pre_hook(self._before_first_block, with_kwargs=True),
        ]
        for index, block in enumerate(blocks):
            self.handles.append(block.register_forward_hook(BlockHook(self, index), with_kwargs=True))

    @property
    def current(self) -> Current:
        """The calling thread's pass."""
        return self.threads.current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder as its own `forward` would, followed."""
        if self.current.recorder is not None:
            return self.run(self.current.recorder, *args, **kwargs)
        if self.intercept is not None:
            return self.intercept(self, *args, **kwargs)
        listener = self.host.make_listener()
        if getattr(listener, "centers", None) is not None and torch.compiler.is_compiling():
            # The hook on the gradient, by which the first training step measures, has no place in a graph.
            return _run_uncompiled(self, listener, *args, **kwargs)
        return self.run(listener, *args, **kwargs)

    def run(self, listener: Listener | None, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder's own forward, without autograd; `listener` is notified.

        Raises:
            UnsupportedBaseError: when the decoder ends without the norm that the side network is attached to.
            ValueError: when something else, in the base or in front of it, wants a gradient.
        """
        current = self.current
        self.host.prepare_base(self.decoder)
        _refuse_training_in_front(kwargs.get("inputs_embeds"))
        current.listener, current.outer_grad = listener, torch.is_grad_enabled()
        current.began = current.ended = False
        torch.set_grad_enabled(False)
        try:
            if self.replaced is not None:
                output = self.replaced(*args, **kwargs)
            else:
                output = type(self.decoder).forward(self.decoder, *args, **kwargs)
        finally:
            torch.set_grad_enabled(current.outer_grad)
            current.listener = None
        if current.began and not current.ended:
            raise UnsupportedBaseError(
                f"{type(self.decoder).__name__} has no norm behind its blocks, so there is no place to mix in the side "
                "network; use a model with a final norm."
            )
        return output

    @contextmanager
    def recording(self, recorder: Listener) -> Iterator[None]:
        """In this thread's passes of this context `recorder` is notified, and nobody else."""
        self.current.recorder = recorder
        try:
            yield
        finally:
            self.current.recorder = None

    @contextmanager
    def mixing(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """In this thread's passes of this context each row has the side network of this name."""
        self.current.adapter_names = adapter_names
        try:
            yield
        finally:
            self.current.adapter_names = None

    def _before_first_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = self.current
        if current.listener is not None:
            arguments = _by_name(block, args, kwargs)
            embeddings = self.stream_of(next(iter(arguments.values()))).detach()  # (batch, length, d)
            with torch.set_grad_enabled(current.outer_grad):
                current.listener.begin(embeddings, BlockCall(block, arguments))
            current.began = True

    def stream_of(self, states: Tensor) -> Tensor:
        """The followed one of (streams, batch, length, d), what blocks hand on; of (batch, length, d) the whole."""
        return states if self.stream is None else states[self.stream]

    def after_norm(self, normed: Tensor) -> Tensor:
        """What the decoder goes on with behind its final norm, which has returned `normed` (batch, length, d)."""
        current = self.current
        if current.listener is None or not current.began:  # a norm of the embeddings is not the final one
            return normed
        current.ended = True
        # Left on: what the decoder does behind its norm (a view, a projection) is on the way to the loss.
        torch.set_grad_enabled(current.outer_grad)
        return current.listener.end(normed)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.replaced or type(self.decoder).forward.__get__(self.decoder))

    def detach(self) -> None:
        """Remove the hooks, and give the decoder its own `forward` back, unless somebody has wrapped this one since."""
        for handle in self.handles:
            handle.remove()
        if vars(self.decoder).get("forward") is self:
            if self.replaced is None:
                del self.decoder.forward
            else:
                self.decoder.forward = self.replaced


class BlockHook:
    """Forward hook of one block; an object, for the same reason."""

    def __init__(self, follower: Follower, index: int) -> None:
        self.follower, self.index = follower, index

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Notify the listener of the block's output, and hand on what it makes of it."""
        current = self.follower.current
        if current.listener is None or self.index not in current.listener.layers:
            return None
        call = BlockCall(block, _by_name(block, args, kwargs))
        states = (output[0] if isinstance(output, tuple) else output).detach()
        with torch.set_grad_enabled(current.outer_grad):
            changed = current.listener.block(self.index, self.follower.stream_of(states), call)
        if changed is None:
            return None
        changed = changed.detach()  # (batch, length, d)
        if self.follower.stream is not None:
            changed = states.index_copy(0, torch.tensor([self.follower.stream], device=states.device), changed[None])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


_run_uncompiled: Callable[..., Any] = torch.compiler.disable(Follower.run)


def follower_of(model: nn.Module) -> Follower | None:
    """The follower of `model`'s decoder, if a side network was attached to it."""
    found = (getattr(module, "follower", None) for module in model.modules())
    return next((follower for follower in found if isinstance(follower, Follower)), None)


@lru_cache(maxsize=256)
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _by_name(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments by name, the hidden states first; families pass different ones by position."""
    names = _positional(type(block).forward)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given if args else {names[0]: given.pop(names[0]), **given}


def _refuse_training_in_front(embeddings: Tensor | None) -> None:
    """Check that no parameter behind `embeddings`, such as a projector's of pictures, waits for a gradient."""
    if embeddings is None or embeddings.grad_fn is None or not torch.is_grad_enabled():
        return
    stack, seen = [embeddings.grad_fn], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions if parent is not None]
    found = sum(isinstance(getattr(node, "variable", None), nn.Parameter) for node in seen)
    if found:
        raise ValueError(
            f"{found} parameters in front of the base's blocks require a gradient, and none reaches them through the "
            "base; freeze them."
        )


def _refuse_replica(decoder: nn.Module, args: tuple[Any, ...]) -> None:
    if getattr(decoder, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel replicates modules in threads, which side tuning cannot follow; launch with "
            "'accelerate launch' or torchrun, or make one GPU visible with CUDA_VISIBLE_DEVICES."
        )
