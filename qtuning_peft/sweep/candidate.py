"""The networks of a sweep: one for every combination of the values that a sweep gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..reading import IGNORE_INDEX
from ..side_tuning import SideTuningConfig
from ..side_tuning.network import NetworkSettings

NETWORK = {field.name for field in fields(NetworkSettings)}
OWN = ("learning_rate", "seed", "data_share")


@dataclass(frozen=True)
class Candidate:
    """One network of a sweep.

    Attributes:
        name: Of its adapter.
        config: Its side network.
        learning_rate: At its highest.
        seed: Of its new weights, and of the rows that it is shown.
        data_share: Share of the training rows that it is shown, (0, 1].
        settings: What it has of its own.
    """

    name: str
    config: SideTuningConfig
    learning_rate: float
    seed: int
    data_share: float
    settings: Mapping[str, Any]

    def label(self) -> str:
        """What it has of its own, in words."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


def candidates(
    config: SideTuningConfig, values: Mapping[str, Sequence[Any]], learning_rate: float, seed: int
) -> list[Candidate]:
    """A network for every combination of `values`.

    Args:
        config: What they have in common.
        values: A list by the name of a setting: any of the side network, `learning_rate`, `seed` or `data_share`.
        learning_rate, seed: Where `values` have none.

    Raises:
        ValueError: for an unknown setting, or a value that does not fit.
    """
    for name, choices in values.items():
        if name not in NETWORK and name not in OWN:
            raise ValueError(f"sweep.{name} is no setting; choose from {', '.join([*OWN, *sorted(NETWORK)])}.")
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
            raise ValueError(f"sweep.{name} is {choices!r}; give a list of values.")
    combinations = [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]
    if len(combinations) < 2:
        raise ValueError("sweep describes one network; give a setting two values or more.")
    digits, found = len(str(len(combinations) - 1)), []
    common = {field.name: getattr(config, field.name) for field in fields(NetworkSettings)}
    for index, own in enumerate(combinations):
        share, rate = own.get("data_share", 1.0), own.get("learning_rate", learning_rate)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"sweep.data_share has {share!r}; choose shares in (0, 1].")
        if not isinstance(rate, int | float) or not rate > 0:
            raise ValueError(f"sweep.learning_rate has {rate!r}; choose numbers above 0.")
        network = common | {name: value for name, value in own.items() if name in NETWORK}
        own_config = SideTuningConfig(**network, task_type="CAUSAL_LM")
        if own_config.side_attention:
            raise ValueError(
                "side_attention is true, but a sweep learns from states of single positions; leave it out."
            )
        found.append(Candidate(f"network_{index:0{digits}}", own_config, rate, own.get("seed", seed), share, own))
    return found


def of_share(targets: Tensor, lengths: Tensor, candidate: Candidate) -> Tensor:
    """`targets` (tokens,) without those of rows, of `lengths` (rows,), that are not of the share the network is shown.

    A row is of it or not by its own tokens: the same in every epoch, live or stored.
    """
    rows = []
    for row in targets.split(lengths.tolist()):
        drawn = xxhash.xxh3_64_intdigest(row.cpu().numpy().tobytes(), seed=candidate.seed) / 2**64
        rows.append(row if drawn < candidate.data_share else torch.full_like(row, IGNORE_INDEX))
    return torch.cat(rows) if rows else targets
