"""Prefix caching: the prompt prefix that rows share is computed once, as the base never changes.

    keys, values (batch, heads, P + rest, size) = [of the prefix, one row for all ; of the rest of each row]

A system prompt, or few-shot examples before every question, are the same P tokens in every row. Under LoRA their keys
and values change with every step; beside a frozen base (QST, ACL 2024, section 3) they are computed once, and a pass
runs over the rest alone. Side blocks that do not attend read nothing of the prefix, so that loss and gradient are those
of the whole rows, up to rounding. The prefix's own positions hold the base's hidden states: it is left out only where
it is declared that none of them is read (see `reading`), as in training, and by classifiers and chunked losses always.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..reading import IGNORE_INDEX
from ..side_tuning.follow import Follower

# Columns that say which tokens are supervised, and the value of one that is not.
SUPERVISION = {"labels": IGNORE_INDEX, "completion_mask": 0, "assistant_masks": 0}
CACHE_NAMES = ("cache", "past_key_values")
# Fewer tokens than this are not worth a concatenation in every block.
SHORTEST = 16


class PrefixLayer(DynamicLayer):
    """Keys and values of the prefix in one block, (1, heads, P, size), put before any batch's, never added to."""

    def __init__(self, filled: Any) -> None:
        super().__init__()
        self.lazy_initialization(filled.keys, filled.values)
        self.keys, self.values = filled.keys, filled.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix and of the rest, (batch, heads, P + rest, size)."""
        batch = key_states.shape[0]
        return (
            torch.cat([self.keys.expand(batch, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(batch, -1, -1, -1), value_states], dim=-2),
        )


class PromptPrefix:
    """Tokens that rows begin with, and what the base computes for them."""

    def __init__(self, input_ids: Sequence[int]) -> None:
        self.input_ids = torch.tensor(list(input_ids), dtype=torch.int64)  # (P,)
        # For every precision that passes are made in: cache and last hidden state (1, P, d), if of use.
        self._computed: dict[Any, tuple[Cache, Tensor] | None] = {}

    def begins(self, follower: Follower, inputs: Mapping[str, Any], first_read: int | None) -> bool:
        """Whether all rows of a pass that may be served begin with the prefix, and nobody reads its positions.

        No hidden state before column `first_read` - 1 is read; `None` if that is not known.
        """
        if not caches_keys_alone(follower, getattr(follower.decoder, "config", None)):
            return False
        length, input_ids, mask = len(self.input_ids), inputs["input_ids"], inputs.get("attention_mask")
        # The last of the prefix must not be what predicts a supervised token.
        if first_read is None or first_read <= length or input_ids.shape[1] <= length:
            return False
        if mask is not None and not mask[:, length - 1].all():
            return False
        return bool((input_ids[:, :length] == self.input_ids.to(input_ids.device)).all())

    def left_out(self, follower: Follower, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor] | None:
        """The decoder's arguments for the rest of each row, and its last hidden state for the prefix, (1, P, d).

        None where what the base keeps of the prefix is not of use.
        """
        input_ids: Tensor = inputs["input_ids"]
        if (computed := self._states(follower, input_ids.device)) is None:
            return None
        cache, hidden_states = computed
        given = {name: inputs.get(name) for name in ("input_ids", "position_ids")}
        rest = {name: value[:, len(self.input_ids) :] for name, value in given.items() if value is not None}
        # Some decoders read no cache where they are not to fill one.
        return {**inputs, **rest, cache_name(follower): cache, "use_cache": True}, hidden_states

    @staticmethod
    def put_back(hidden_states: Tensor, output: Any) -> Any:
        """A decoder's `output` for the rest of each row, with the prefix's `hidden_states` (1, P, d) in front."""
        rest = output.last_hidden_state  # (batch, rest, d)
        whole = torch.cat([hidden_states.to(rest).expand(rest.shape[0], -1, -1), rest], dim=1)
        if whole.requires_grad:
            whole.register_hook(partial(_refuse_reading, length=hidden_states.shape[1]))
        others = {name: output[name] for name in output if name not in ("last_hidden_state", *CACHE_NAMES)}
        return type(output)(last_hidden_state=whole, **others)

    @torch.no_grad()
    def _states(self, follower: Follower, device: torch.device) -> tuple[Cache, Tensor] | None:
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        place = device, autocast, next(follower.decoder.parameters()).dtype
        if place not in self._computed:
            run, name = partial(follower.run, None), cache_name(follower)
            self._computed[place] = compute(run, self.input_ids[None].to(device), name)
        return self._computed[place]

    def __getstate__(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "_computed": {}}


def compute(decoder: Callable[..., Any], input_ids: Tensor, name: str) -> tuple[Cache, Tensor] | None:
    """What `decoder` computes for a prefix `input_ids` (1, P): a cache for any batch behind it, and the last state.

    Returns:
        The cache, which `decoder` takes as the argument `name`, and the state, (1, P, d); none where blocks did not
        run, or keep other keys than one for each token.
    """
    filled = DynamicCache()
    output = decoder(input_ids=input_ids, use_cache=True, **{name: filled})
    if not filled.layers or not all(
        layer.is_initialized and layer.keys.shape[-2] == input_ids.shape[1] for layer in filled.layers
    ):
        return None
    return Cache(layers=[PrefixLayer(layer) for layer in filled.layers]), output.last_hidden_state


def caches_keys_alone(forward: Callable[..., Any], config: Any) -> bool:
    """Whether a decoder hands nothing from token to token but keys and values: no recurrent state, no index."""
    try:
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    except (AttributeError, KeyError):  # a configuration of its own, or kinds of blocks that transformers does not know
        return False
    takes_a_cache = any(name in inspect.signature(forward).parameters for name in CACHE_NAMES)
    return takes_a_cache and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def _refuse_reading(gradient: Tensor, length: int) -> None:
    if gradient[:, :length].any():
        raise RuntimeError(
            "The loss reads positions of the prompt prefix, though labels say that it does not: their gradient would "
            "be lost; leave out PrefixCachingCallback."
        )


def cache_name(forward: Callable[..., Any]) -> str:
    """What a model calls its key-value cache: `cache` in transformers from 5.24 on, before `past_key_values`."""
    return next((name for name in CACHE_NAMES if name in inspect.signature(forward).parameters), CACHE_NAMES[-1])


def is_prefix(inputs: Mapping[str, Any]) -> bool:
    """Whether a decoder's arguments bring a prompt prefix."""
    cache = next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)
    return isinstance(cache, Cache) and bool(cache.layers) and isinstance(cache.layers[0], PrefixLayer)


def common_prefix(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Token ids of the longest unsupervised prefix that rows have in common; none if they would be few.

    Every row has at least one unsupervised token behind them, so that whatever predicts a supervised one is computed
    with its row.

    Args:
        rows: With `input_ids`, and `labels`, `completion_mask` or `assistant_masks` that say which are supervised, or
            the number of a class.
    """
    found: list[int] | None = None
    for row in rows:
        if not isinstance(row, Mapping) or np.ndim(row.get("input_ids", 0)) != 1:
            return []
        own = list(row["input_ids"])[: max(0, _supervised_from(row) - 1)]
        found = own if found is None else found[: _agreeing(found, own)]
    return found if found is not None and len(found) >= SHORTEST else []


def _agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens up to the first that differs."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), min(len(first), len(second)))


def _supervised_from(row: Mapping[str, Any]) -> int:
    """Position of the first supervised token; behind the last where a class is predicted from it."""
    # Labels of tokens decide alone where there are any; the mask they were made of may have been overruled.
    names = ("labels",) if np.ndim(row.get("labels", 0)) else SUPERVISION
    columns = [(row[name], SUPERVISION[name]) for name in names if np.ndim(row.get(name, 0))]
    if not columns:
        a_class = any(row.get(name) is not None for name in ("label", "labels"))
        return len(row["input_ids"]) if a_class else 0
    return max(
        next((index for index, value in enumerate(values) if value != unsupervised), len(values))
        for values, unsupervised in columns
    )
