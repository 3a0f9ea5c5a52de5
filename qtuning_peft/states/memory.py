"""The hidden-state cache: what the base computes for a row, kept from its first epoch to its last, or longer.

The base never changes (QST, ACL 2024, section 3), so what it computes for a row in the first epoch holds in every
other: from the second on a step is the side network and the head. Of a row n positions are read, and take
n (N + 2) d numbers for N taps, the embeddings and the final norm; where they are kept is said in `stores`. Rows for
which there is no room are computed every time.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reading import read_positions
from ..sharding import agreed
from ..side_tuning.follow import AtPositions, BaseStates, Follower, Listener
from .prefix import is_prefix
from .stores import Store, key_of


class HiddenStateCache:
    """States of the tapped blocks `layers` by the tokens of a row, in `store`.

    Attributes:
        prefix: Tokens (P,) that a pass behind a prompt prefix has left out.
    """

    def __init__(self, store: Store, layers: Collection[int]) -> None:
        self.store, self.layers = store, layers
        self.prefix = np.zeros(0, np.int64)
        self._like: BaseStates | None = None  # of no tokens: devices, dtypes, kind of output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_like": None}

    @property
    def used(self) -> int:
        """Bytes that the store has taken."""
        return self.store.used

    def serve(self, follower: Follower, inputs: dict[str, Any], listener: Listener) -> Any:
        """What the decoder returns for a pass that may be served, from cached states or from the base's, now cached.

        `None` if the decoder does more behind its norm than can be done again.
        """
        input_ids: Tensor = inputs["input_ids"]  # (batch, length)
        read = _kept(input_ids, inputs.get("attention_mask"))  # (batch, length)
        keys = _keys(input_ids, read, self.prefix if is_prefix(inputs) else self.prefix[:0])
        kept = [] if self._like is None else [self.store.get(key) for key in keys]
        found = [states for states in kept if states is not None]
        known = self._like is not None and len(found) == len(keys)
        place = AtPositions(listener.listener if isinstance(listener, AtPositions) else listener, read)
        if agreed(known, follower.decoder, input_ids):
            assert self._like is not None
            states = self._like.with_parts(torch.cat(found, dim=1).unsqueeze(1))
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
        rows = torch.stack([part[0].to(parts[0].device, parts[0].dtype) for part in parts]).cpu()  # (N + 2, tokens, d)
        for key, row in zip(keys, rows.split(lengths, dim=1), strict=True):
            self.store.add(key, row)


def _kept(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Positions of a batch to keep, (batch, length), bool: those that are read, or, where nobody says, all tokens."""
    read = read_positions()
    if read is not None and read.shape == input_ids.shape:
        return read.to(input_ids.device)
    return torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask[:, -input_ids.shape[1] :].bool()


def _keys(input_ids: Tensor, read: Tensor, prefix: np.ndarray) -> list[bytes]:
    """The key of every row (see `stores`), with the prefix (P,) in front of it."""
    rows = zip(input_ids.cpu().numpy(), read.cpu().numpy(), strict=True)
    return [key_of(np.concatenate([prefix, row]), kept.nonzero()[0] + len(prefix)) for row, kept in rows]
