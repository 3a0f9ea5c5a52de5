"""The base's pass as data: scores and hidden states of every row, computed once; from then on training needs no base.

    h = mix(f_N, g_N)         f_N and the taps of g are read from disk;  the head alone is in memory

The base never changes (QST, ACL 2024, section 3), so what it computes for a row is a fact about the row.
"""

from .compute import compute_states
from .manifest import HEAD, MANIFEST, Manifest, holds_states, states_of
from .model import model_from_states
from .rows import StatesCollator, StoredRows, load_states, prune_states
from .view import STATES, VIEW, pruned_view

__all__ = [
    "HEAD", "MANIFEST", "STATES", "VIEW", "Manifest", "StatesCollator", "StoredRows", "compute_states",
    "holds_states", "load_states", "model_from_states", "prune_states", "pruned_view", "states_of",
]  # fmt: skip
