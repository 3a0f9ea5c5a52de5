"""Following a base without an adapter: the layer that takes the norm's place, put there for a while or for good."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..follow import Decoder, Follower, find_decoder, follower_of
from .layer import SideTuningLayer


def place(model: nn.Module, decoder: Decoder, layer: SideTuningLayer | nn.Module) -> None:
    """Put `layer` where the final norm is."""
    parent, _, name = decoder.norm_path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


@contextmanager
def following(model: nn.Module) -> Iterator[Follower]:
    """The follower of the decoder in `model`: its side network's, or one that is attached for this context alone."""
    follower = follower_of(model)
    if follower is not None:
        yield follower
        return
    decoder = find_decoder(model)
    norm = model.get_submodule(decoder.norm_path)
    layer = SideTuningLayer(norm, decoder)
    place(model, decoder, layer)
    layer.attach_to_base(decoder)
    assert layer.follower is not None
    try:
        yield layer.follower
    finally:
        layer.detach_from_base()
        place(model, decoder, norm)
