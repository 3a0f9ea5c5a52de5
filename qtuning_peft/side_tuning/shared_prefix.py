"""What every row begins with, computed once: its keys and values stay valid, because the base never changes.

    keys, values (batch, heads, P + rest, size) = [of the prefix, one row for all ; of the rest of each row]

A system prompt, or worked examples before every question, are the same P tokens in every row. Under LoRA their keys and
values change with every step; beside a frozen base (QST, ACL 2024, section 3) they are computed once, and a pass only
runs over the rest. Side blocks that do not attend read nothing of the prefix, so that loss and gradient are those of
the whole rows, up to rounding. The prefix's own positions hold the base's hidden states: it is left out only while
training, by a loss that says that none of them is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..loss import IGNORE_INDEX
from .base_states import MORE_OUTPUTS, BaseStates

if TYPE_CHECKING:
    from .layer import SideTuningLayer

# Columns that say which tokens are supervised, and the value of one that is not.
SUPERVISION = {"labels": IGNORE_INDEX, "completion_mask": 0, "assistant_masks": 0}
# Fewer tokens than this are not worth a concatenation in every block.
SHORTEST = 16


class PrefixLayer(DynamicLayer):
    """Keys and values of the prefix in one block, (1, heads, P, size), put in front of any batch's and never added to.

    Args:
        filled: A layer that the prefix has filled.
    """

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


class SharedPrefix:
    """Tokens that rows begin with, and what the base computes for them.

    Args:
        input_ids: Their ids.
    """

    def __init__(self, input_ids: Sequence[int]) -> None:
        self.input_ids = torch.tensor(list(input_ids), dtype=torch.int64)  # (P,)
        # For every precision that passes are made in: the cache, and the last hidden state (1, P, d).
        self._computed: dict[Any, tuple[Cache, Tensor]] = {}

    def begins(self, input_ids: Any, arguments: Mapping[str, Any]) -> bool:
        """Whether a decoder called with `input_ids` (batch, length) and `arguments` can leave the prefix out."""
        prefix = len(self.input_ids)
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.shape[1] <= prefix:
            return False
        given = {
            name: value
            for name, value in arguments.items()
            if name != "input_ids" and value is not None and value is not False
        }
        if given.pop("return_dict", True) is not True or any(name in given for name in (*MORE_OUTPUTS, "use_cache")):
            return False
        mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
        if any(isinstance(value, Tensor) and value.dim() for value in given.values()):
            return False  # boundaries of packed rows, image features: who knows whose columns they are
        attended = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        if not isinstance(attended, Tensor) or attended.shape != input_ids.shape or not attended[:, :prefix].all():
            return False
        counted = torch.arange(input_ids.shape[1], device=input_ids.device)
        if positions is not None and not ((positions == counted) | (attended == 0)).all():
            return False
        return bool((input_ids[:, :prefix] == self.input_ids.to(input_ids.device)).all())

    def without(self, value: Any) -> Any:
        """`value`, less the prefix's columns where it is an integer tensor (batch, length)."""
        return value[:, len(self.input_ids) :] if isinstance(value, Tensor) else value

    @torch.no_grad()
    def computed(self, layer: SideTuningLayer, run: Callable[..., Any], device: torch.device) -> tuple[Cache, Tensor]:
        """The prefix's keys and values, and the base's last hidden state for it, (1, P, d)."""
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        place = device, autocast, next(layer.decoder.parameters()).dtype
        if place not in self._computed:
            input_ids = self.input_ids[None].to(device)  # (1, P)
            cache = DynamicCache()
            # Recorded, so that the side network rests.
            with layer.recording(BaseStates(input_ids)), layer.following(layer.decoder):
                output = run(input_ids=input_ids, past_key_values=cache, use_cache=True)
            cache = Cache(layers=[PrefixLayer(filled) for filled in cache.layers])
            self._computed[place] = cache, output.last_hidden_state
        return self._computed[place]

    def __getstate__(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "_computed": {}}


def unsupervised_columns(labels: Any) -> int:
    """Number of columns at the left of `labels` (batch, length) in which no row is supervised."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return 0
    supervised = (labels != IGNORE_INDEX).any(dim=0).nonzero()
    return int(supervised[0]) if len(supervised) else labels.shape[1]


def depends_on_length(config: Any) -> bool:
    """Whether a token's states depend on what comes after it: on the length, or by attention in both directions."""

    def kinds(parameters: Any) -> Iterator[Any]:
        if isinstance(parameters, Mapping):
            yield parameters.get("rope_type")
            for value in parameters.values():
                yield from kinds(value)

    changing = {"dynamic", "longrope"} & set(kinds(getattr(config, "rope_parameters", None)))
    return bool(changing) or getattr(config, "is_causal", True) is False


def is_prefix(cache: Any) -> bool:
    """Whether `cache` holds a shared prefix."""
    return isinstance(cache, Cache) and bool(cache.layers) and isinstance(cache.layers[0], PrefixLayer)


def with_prefix(prefix: Tensor, output: Any) -> Any:
    """A decoder's `output` for the rest of each row, with the prefix's hidden state (1, P, d) in front."""
    rest = output.last_hidden_state  # (batch, rest, d)
    hidden_states = torch.cat([prefix.to(rest).expand(rest.shape[0], -1, -1), rest], dim=1)
    others = {name: output[name] for name in output if name not in ("last_hidden_state", "past_key_values")}
    return type(output)(last_hidden_state=hidden_states, **others)


def common_prefix(rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """The longest unsupervised prefix that rows have in common.

    Args:
        rows: With `input_ids`, and `labels`, `completion_mask` or `assistant_masks` that say which are supervised, or
            the number of a class.

    Returns:
        Token ids. Every row has at least one unsupervised token behind them, so that whatever predicts a supervised
        one is computed with its row. None if they would be few, if all tokens are supervised, or if rows have no
        tokens yet.
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
