"""The hidden-state cache: what the base computes for a row, kept in main memory from its first epoch to its last.

The base never changes (QST, ACL 2024, section 3), so what it computes for a row in the first epoch holds in every
other: from the second on a step is the side network and the head. A row of n tokens takes n (N + 2) d numbers of 16
bits for N taps, the embeddings and the final norm. Rows beyond the budget are computed every time.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..sharding import agreed
from ..side_tuning.follow import BaseStates, Follower
from .prefix import is_prefix


class HiddenStateCache:
    """States of the tapped blocks `layers` by the tokens of a row, in `budget` bytes, of which `used` are used."""

    def __init__(self, budget: int, layers: Collection[int]) -> None:
        self.budget, self.layers, self.used = budget, layers, 0
        self._rows: dict[bytes, Tensor] = {}  # (N + 2, n, d): embeddings, taps, final norm
        self._like: BaseStates | None = None  # of no rows: devices, dtypes, kind of output

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model computes its own.
        return {**vars(self), "used": 0, "_rows": {}, "_like": None}

    def states(self, follower: Follower, inputs: dict[str, Any]) -> BaseStates | None:
        """The states for a pass that may be served: cached ones, or those of the base, which are then cached.

        `None` if the decoder does more behind its norm than can be done again.
        """
        input_ids: Tensor = inputs["input_ids"]  # (batch, length)
        length, mask = input_ids.shape[1], inputs.get("attention_mask")
        lengths = [length] * len(input_ids) if mask is None else mask[:, -length:].bool().sum(1).tolist()
        tokens = input_ids.to("cpu", torch.int64).numpy()
        # The same tokens behind the prompt prefix are not the same row.
        behind = b"+" if is_prefix(inputs) else b""
        keys = [behind + row[:own].tobytes() for row, own in zip(tokens, lengths, strict=True)]
        known = self._like is not None and all(key in self._rows for key in keys)
        if agreed(known, follower.decoder, input_ids):
            assert self._like is not None
            return self._padded(self._like, [self._rows[key] for key in keys], input_ids)
        states = BaseStates(self.layers)
        with torch.no_grad():
            states.output = follower.run(states, **inputs)
        assert states.normed is not None
        if states.output.last_hidden_state.shape != states.normed.shape:
            return None
        # Nothing but the hidden state: a key-value cache would be that of this batch.
        states.output = type(states.output)(last_hidden_state=states.normed)
        self._like = self._like or _of_no_rows(states)
        for index, (key, own) in enumerate(zip(keys, lengths, strict=True)):
            if key not in self._rows:
                self._add(key, states, index, own)
        return states

    def _add(self, key: bytes, states: BaseStates, index: int, length: int) -> None:
        parts = _parts(states)
        size = 2 * len(parts) * length * parts[0].shape[-1]
        if self.used + size > self.budget:
            return
        dtype = parts[0].dtype if parts[0].dtype.itemsize == 2 else torch.bfloat16
        home = parts[0].device
        self._rows[key] = torch.stack([part[index, :length].to(home, dtype) for part in parts]).cpu()
        self.used += size

    @staticmethod
    def _padded(like: BaseStates, rows: list[Tensor], input_ids: Tensor) -> BaseStates:
        count, _, width = rows[0].shape
        padded = rows[0].new_zeros(count, *input_ids.shape, width)  # (N + 2, batch, length, d)
        for index, row in enumerate(rows):
            padded[:, index, : row.shape[1]] = row
        parts = [part.to(original.device, original.dtype) for part, original in zip(padded, _parts(like), strict=True)]
        return _with_parts(like, parts)


def _of_no_rows(states: BaseStates) -> BaseStates:
    empty = _with_parts(states, [part[:0].clone() for part in _parts(states)])
    return replace(empty, output=type(states.output)(last_hidden_state=empty.normed))


def _parts(states: BaseStates) -> list[Tensor]:
    """Embeddings, taps and final norm, each (batch, length, d)."""
    assert states.normed is not None
    return [*states.taps(), states.normed]


def _with_parts(states: BaseStates, parts: list[Tensor]) -> BaseStates:
    embeddings, *taps, normed = parts
    blocks = [(index, tap) for (index, _), tap in zip(states.blocks, taps, strict=True)]
    return replace(states, embeddings=embeddings, blocks=blocks, normed=normed)
