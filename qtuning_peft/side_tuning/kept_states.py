"""Hidden states of the base, kept in main memory from a row's first epoch to its last.

The base never changes (QST, ACL 2024, section 3), so what it computes for a row in the first epoch holds in every
other: from the second on a step is the side network and the head. A row of n tokens takes n (N + 2) d numbers of 16
bits for N taps, the embeddings and the final norm. Rows beyond the budget are computed every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base_states import BaseStates
from .shared_prefix import is_prefix

if TYPE_CHECKING:
    from .layer import SideTuningLayer

# What a pass may be given beside token ids: nothing else decides a row's states if it is padded at the right.
KNOWN = {"input_ids", "attention_mask", "return_dict", "past_key_values"}


class KeptStates:
    """States by the tokens of a row.

    Args:
        budget: Bytes to hold at most.
        layers: Indices of the tapped blocks.

    Attributes:
        held: Bytes that are held.
    """

    def __init__(self, budget: int, layers: list[int]) -> None:
        self.budget, self.layers, self.held = budget, layers, 0
        self._rows: dict[bytes, Tensor] = {}  # (N + 2, n, d): embeddings, taps, final norm
        self._like: BaseStates | None = None  # of no rows: blocks, devices, dtype, kind of output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "held": 0, "_rows": {}, "_like": None}

    def serve(self, arguments: dict[str, Any]) -> bool:
        """Whether a pass over `arguments` depends on nothing but each row's tokens."""
        input_ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        given = {
            name
            for name, value in arguments.items()
            if value is not None and value is not False and not (isinstance(value, Tensor) and not value.dim())
        }
        cache = arguments.get("past_key_values")
        if not isinstance(input_ids, Tensor) or not given <= KNOWN or not (cache is None or is_prefix(cache)):
            return False
        if mask is None:
            return True
        longer = 0 if cache is None else cache.get_seq_length()
        if not isinstance(mask, Tensor) or mask.shape != (input_ids.shape[0], longer + input_ids.shape[1]):
            return False
        return bool((mask[:, 1:] <= mask[:, :-1]).all())

    def states(self, layer: SideTuningLayer, run: Callable[[], Any], arguments: dict[str, Any]) -> BaseStates | None:
        """The states for a pass over `arguments`: kept ones, or those of `run`, which are then kept.

        None if the decoder does more behind its norm than can be done again.
        """
        input_ids: Tensor = arguments["input_ids"]  # (batch, length)
        length = input_ids.shape[1]
        mask = arguments.get("attention_mask")
        lengths = [length] * len(input_ids) if mask is None else mask[:, -length:].sum(1).tolist()
        tokens = input_ids.to("cpu", torch.int64).numpy()
        # The same tokens behind the shared prefix are not the same row.
        behind = b"+" if is_prefix(arguments.get("past_key_values")) else b""
        keys = [behind + row[:own].tobytes() for row, own in zip(tokens, lengths, strict=True)]
        if self._like is not None and all(key in self._rows for key in keys):
            return self._padded(self._like, [self._rows[key] for key in keys], input_ids)
        states = BaseStates(input_ids)
        with torch.no_grad(), layer.recording(states), layer.following(layer.decoder):
            states.output = run()
        assert states.normed is not None
        if states.output.last_hidden_state.shape != states.normed.shape:
            return None
        # Nothing but the hidden state: a cache would be that of this batch.
        states.output = type(states.output)(last_hidden_state=states.normed)
        self._like = self._like or _of_no_rows(states)
        for index, (key, own) in enumerate(zip(keys, lengths, strict=True)):
            if key not in self._rows:
                self._keep(key, states, index, own)
        return states

    def _keep(self, key: bytes, states: BaseStates, index: int, length: int) -> None:
        parts = _parts(states)
        size = 2 * len(parts) * length * parts[0].shape[-1]
        if self.held + size > self.budget:
            return
        dtype = parts[0].dtype if parts[0].dtype.itemsize == 2 else torch.bfloat16
        home = parts[0].device
        self._rows[key] = torch.stack([part[index, :length].to(home, dtype) for part in parts]).cpu()
        self.held += size

    @staticmethod
    def _padded(like: BaseStates, rows: list[Tensor], input_ids: Tensor) -> BaseStates:
        count, _, width = rows[0].shape
        padded = rows[0].new_zeros(count, *input_ids.shape, width)  # (N + 2, batch, length, d)
        for index, row in enumerate(rows):
            padded[:, index, : row.shape[1]] = row
        embeddings, *taps, normed = (
            part.to(original.device, original.dtype) for part, original in zip(padded, _parts(like), strict=True)
        )
        blocks = [(block, given, tap) for (block, given, _), tap in zip(like.blocks, taps, strict=True)]
        return replace(like, input_ids=input_ids, embeddings=embeddings, blocks=blocks, normed=normed)


def _of_no_rows(states: BaseStates) -> BaseStates:
    embeddings, *_, normed = _parts(states)
    blocks: list[Any] = [(block, {}, hidden_states[:0].clone()) for block, _, hidden_states in states.blocks]
    return BaseStates(
        states.input_ids[:0], embeddings=embeddings[:0].clone(), blocks=blocks, normed=normed[:0].clone(),
        output=type(states.output)(last_hidden_state=normed[:0].clone()),
    )  # fmt: skip


def _parts(states: BaseStates) -> list[Tensor]:
    """Embeddings, taps and final norm, each (batch, length, d)."""
    assert states.embeddings is not None
    assert states.normed is not None
    return [states.embeddings, *(hidden_states for _, _, hidden_states in states.blocks), states.normed]
