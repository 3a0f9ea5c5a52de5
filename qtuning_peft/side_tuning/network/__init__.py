"""The mathematics of a side network (QST, ACL 2024), in plain torch: it knows no PEFT, no hooks and no trainer."""

from .downsample import DOWNSAMPLERS, DownSampler, down_sampler
from .mixing import MIXINGS, Mixing
from .network import SideNetwork
from .settings import NetworkSettings
from .shape import BaseShape, UnsupportedBaseError

__all__ = [
    "DOWNSAMPLERS", "MIXINGS", "BaseShape", "DownSampler", "Mixing", "NetworkSettings", "SideNetwork",
    "UnsupportedBaseError", "down_sampler",
]  # fmt: skip
