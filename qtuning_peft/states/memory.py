"""The hidden-state cache: what the base computes for a row, kept in main memory from its first epoch to its last.

The base never changes (QST, ACL 2024, section 3), so what it computes for a row in the first epoch holds in every
other: from the second on a step is the side network and the head. Of a row n positions are read, and take
n (N + 2) d numbers of 16 bits for N taps, the embeddings and the final norm. Rows beyond the budget are computed every
time.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..reading import read_positions
from ..sharding import agreed
from ..side_tuning.follow import AtPositions, BaseStates, Follower, Listener
from .prefix import is_prefix


class HiddenStateCache:
    """States of the tapped blocks `layers` by the tokens of a row, in `budget` bytes, of which `used` are used."""

    def __init__(self, budget: int, layers: Collection[int]) -> None:
        self.budget, self.layers, self.used = budget, layers, 0
        self._rows: dict[bytes, Tensor] = {}  # (N + 2, n, d): embeddings, taps, final norm
        self._like: BaseStates | None = None  # of no tokens: devices, dtypes, kind of output

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model computes its own.
        return {**vars(self), "used": 0, "_rows": {}, "_like": None}

    def serve(self, follower: Follower, inputs: dict[str, Any], listener: Listener) -> Any:
        """What the decoder returns for a pass that may be served, from cached states or from the base's, now cached.

        `None` if the decoder does more behind its norm than can be done again.
        """
        input_ids: Tensor = inputs["input_ids"]  # (batch, length)
        read = _kept(input_ids, inputs.get("attention_mask"))  # (batch, length)
        # The same tokens behind the prompt prefix are not the same row.
        behind = b"+" if is_prefix(inputs) else b""
        keys = [behind + key for key in _keys(input_ids, read)]
        known = self._like is not None and all(key in self._rows for key in keys)
        place = AtPositions(listener.listener if isinstance(listener, AtPositions) else listener, read)
        if agreed(known, follower.decoder, input_ids):
            assert self._like is not None
            states = self._like.with_parts(torch.cat([self._rows[key] for key in keys], dim=1).unsqueeze(1))
        else:
            states = BaseStates(self.layers)
            with torch.no_grad():
                recorder = AtPositions(states, read)
                states.output = follower.run(recorder, **inputs)
            if not recorder.matches or states.output.last_hidden_state.shape[:2] != read.shape:
                return None
            # Nothing but the hidden state: a key-value cache would be that of this batch.
            states.output = type(states.output)(last_hidden_state=states.output.last_hidden_state[:, :0])
            self._like = self._like or states.with_parts(torch.stack([part[:, :0] for part in states.parts()]))
            self._add(keys, states, read.sum(1).tolist())
        output = states.replay(place.listener)
        hidden_states = output["last_hidden_state"]  # (1, tokens, d)
        whole = hidden_states.new_zeros(*read.shape, hidden_states.shape[-1])
        output["last_hidden_state"] = place.put(whole, hidden_states)
        return output

    def _add(self, keys: list[bytes], states: BaseStates, lengths: list[int]) -> None:
        parts = states.parts()
        dtype = parts[0].dtype if parts[0].dtype.itemsize == 2 else torch.bfloat16
        rows = torch.stack([part[0].to(parts[0].device, dtype) for part in parts]).cpu()  # (N + 2, tokens, d)
        for key, row in zip(keys, rows.split(lengths, dim=1), strict=True):
            size = row.nbytes
            if key not in self._rows and self.used + size <= self.budget:
                self._rows[key] = row.clone()
                self.used += size


def _kept(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Positions of a batch to keep, (batch, length), bool: those that are read, or, where nobody says, all tokens."""
    read = read_positions()
    if read is not None and read.shape == input_ids.shape:
        return read.to(input_ids.device)
    return torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask[:, -input_ids.shape[1] :].bool()


def _keys(input_ids: Tensor, read: Tensor) -> list[bytes]:
    """Of every row, its tokens up to the last position that is read, and which are."""
    tokens, kept = input_ids.to("cpu", torch.int64).numpy(), read.cpu().numpy()
    lengths = [int(row.nonzero()[0].max(initial=-1)) + 1 for row in kept]
    return [tokens[index, :length].tobytes() + kept[index, :length].tobytes() for index, length in enumerate(lengths)]
