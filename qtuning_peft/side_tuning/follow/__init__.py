"""Following a pass of the frozen base: where its decoder is, who listens to it, and what is recorded of it."""

from .decoder import Decoder, find_decoder
from .fit import fit_projections
from .follower import BlockCall, Follower, Listener, follower_of
from .mixed import BASE, MixedRows
from .positions import AtPositions, at_read_positions
from .recorder import BaseStates, record_states
from .replay import from_parts, from_pass, replayed_cross_entropy, stored_cross_entropy
from .run import SideRun

__all__ = [
    "BASE", "AtPositions", "BaseStates", "BlockCall", "Decoder", "Follower", "Listener", "MixedRows", "SideRun",
    "at_read_positions", "find_decoder", "fit_projections", "follower_of", "from_parts", "from_pass", "record_states",
    "replayed_cross_entropy", "stored_cross_entropy",
]  # fmt: skip
