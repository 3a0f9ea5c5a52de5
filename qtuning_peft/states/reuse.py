"""Reuse of the base's work: where a decoder's output comes from when the base need not run, or not over whole rows.

The prompt prefix, the hidden-state cache, or else a plain pass; `may_serve` says whether a pass may be served. The base
never changes (QST, ACL 2024, section 3), and a position-wise side network reads nothing but the base's states at its
position: so what is reused gives the same loss and gradient, up to rounding. Where the base's parameters are sharded,
all processes reuse, or none (see `sharding`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..reading import behind, first_column
from ..sharding import agreed
from ..side_tuning.follow import Follower, follower_of
from .memory import HiddenStateCache
from .prefix import CACHE_NAMES, PromptPrefix
from .stores import MemoryStore, Store

# Arguments of a decoder that ask for, or bring, more than the last hidden state.
MORE = ("output_hidden_states", "output_attentions", "output_router_logits", *CACHE_NAMES)
# Those that a row's states may depend on.
ROW_ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "return_dict"}


class Reuse:
    """Serves the passes of one follower (see `Follower.intercept`) of which it is known where they are read."""

    def __init__(self) -> None:
        self.prefix: PromptPrefix | None = None
        self.cache: HiddenStateCache | None = None

    def cache_prefix(self, input_ids: Sequence[int]) -> None:
        """Compute the tokens `input_ids` once for all rows that begin with them; none for an empty list."""
        self.prefix = PromptPrefix(input_ids) if len(input_ids) else None
        if self.cache is not None:
            self.cache.prefix = np.asarray(input_ids, np.int64)

    def __call__(self, follower: Follower, *args: Any, **kwargs: Any) -> Any:
        """What the decoder returns."""
        inputs = {"input_ids": args[0], **kwargs} if len(args) == 1 else kwargs
        # The cache in training steps alone: evaluation sees each row once.
        caches = self.cache is not None and follower.host.training and torch.is_grad_enabled()
        if len(args) <= 1:
            # Whether one process can do without the base depends on its batch.
            like = next((value for value in inputs.values() if isinstance(value, Tensor)), torch.empty(0))
            decoder, prefix = follower.decoder, self.prefix
            if agreed(bool(prefix or caches) and may_serve(follower, inputs), decoder, like):
                begins = prefix is not None and prefix.begins(follower, inputs, first_column())
                left_out = prefix.left_out(follower, inputs) if agreed(begins, decoder, like) and prefix else None
                if left_out is None:
                    return self._cached(follower, inputs, caches)
                rest, hidden_states = left_out
                with behind(hidden_states.shape[1]):
                    return PromptPrefix.put_back(hidden_states, self._cached(follower, rest, caches))
        return follower.run(follower.host.make_listener(), *args, **kwargs)

    def _cached(self, follower: Follower, inputs: dict[str, Any], caches: bool) -> Any:
        listener = follower.host.make_listener()
        if caches and self.cache is not None and listener is not None and self.cache.layers == listener.layers:
            output = self.cache.serve(follower, inputs, listener)
            if output is not None:
                return output
        return follower.run(listener, **inputs)


def may_serve(follower: Follower, inputs: Mapping[str, Any]) -> bool:
    """Whether what the base computed earlier, for other batches, may answer a pass of a training step.

    The pass must ask for the last hidden state and nothing more, and a position's states must depend on nothing but the
    tokens up to it: rows padded at the right and not packed, positions counted from 0, a causal base whose positions do
    not depend on the length, and side blocks that do not attend.
    """
    network = follower.host.active_network()
    if network is None or network.attends or any(inputs.get(name) for name in MORE):
        return False
    given = {
        name for name, value in inputs.items()
        if value is not None and value is not False and not (isinstance(value, Tensor) and not value.dim())
    }  # fmt: skip
    input_ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if not given <= ROW_ARGUMENTS or not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        return False
    if depends_on_length(getattr(follower.decoder, "config", None)):
        return False
    attended = torch.ones_like(input_ids) if mask is None else mask
    if not isinstance(attended, Tensor) or attended.shape != input_ids.shape:
        return False
    padded_right = (attended[:, 1:] <= attended[:, :-1]).all()
    if positions is None:
        return bool(padded_right)
    counted = positions == torch.arange(input_ids.shape[1], device=input_ids.device)
    return bool(padded_right and (counted | (attended == 0)).all())


def depends_on_length(config: Any) -> bool:
    """Whether a token's states depend on what comes after it: on the length, or by attention in both directions."""

    def kinds(parameters: Any) -> Iterator[Any]:
        if isinstance(parameters, Mapping):
            yield parameters.get("rope_type")
            for value in parameters.values():
                yield from kinds(value)

    changing = {"dynamic", "longrope"} & set(kinds(getattr(config, "rope_parameters", None)))
    return bool(changing) or getattr(config, "is_causal", True) is False


def reuse_of(model: nn.Module) -> Reuse | None:
    """What serves the passes of `model`'s base, attached when it is first asked for; `None` without a side network."""
    follower = follower_of(model)
    if follower is None:
        return None
    if not isinstance(follower.intercept, Reuse):
        follower.intercept = Reuse()
    return follower.intercept


def cache_states(model: nn.Module, store: Store | int) -> None:
    """Cache the base's states of rows that the active adapter trains on, in `store`, or so many bytes of memory."""
    follower, reuse = follower_of(model), reuse_of(model)
    if follower is not None and reuse is not None:
        network = follower.host.active_network()
        store = MemoryStore(store) if isinstance(store, int) and store else store
        reuse.cache = None
        if network is not None and not isinstance(store, int):
            reuse.cache = HiddenStateCache(store, network.layers)
            if reuse.prefix is not None:
                reuse.cache.prefix = reuse.prefix.input_ids.numpy()
