"""Training on cached hidden states: a loss, optimizers, and a clock that runs while a network steps.

    L = - 1/|T| sum_(t in T) log softmax_V(H f'_(t-1))[y_t]

H is the base's head. In training V is what the base finds likely and what the rows contain, a tenth of the vocabulary
and of the cost; validation rows are measured over all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.methods import trained
from benchmarks.quality.learner import factor
from benchmarks.quality.muon import Muon
from benchmarks.quality.networks import STATISTICS_BATCHES, Network
from benchmarks.quality.tasks import Batch
from benchmarks.step import seconds
from qtuning_peft.loss import IGNORE_INDEX, summed_cross_entropy, supervised_positions

LIKELY, CHUNK = 4000, 512


@dataclass(frozen=True)
class Rates:
    """Learning rates at their highest.

    Attributes:
        rate: AdamW's.
        up: Of the up-projection, where it is another.
        linear: Of the linear maps, where it is another.
        muon: Muon's, which then trains every other matrix.
    """

    rate: float
    up: float | None = None
    linear: float | None = None
    muon: float | None = None


class Data:
    """Cached hidden states, and losses on them.

    Args:
        train: Batches to train on.
        validation: Batches to measure on.
        head: (vocabulary, d), float32.
    """

    def __init__(self, train: list[Batch], validation: list[Batch], head: Tensor) -> None:
        self.train, self.validation, self.head, self.device = train, validation, head, head.device
        vocabulary = self._vocabulary()
        self.small_head = head[vocabulary]
        self.place = torch.full((len(head),), -1, device=self.device)  # (vocabulary,): of a token in the small one
        self.place[vocabulary] = torch.arange(len(vocabulary), device=self.device)

    @torch.no_grad()
    def _vocabulary(self) -> Tensor:
        likely = torch.zeros(len(self.head), device=self.device)
        for batch in self.train[:STATISTICS_BATCHES]:
            states, _ = supervised_positions(batch["normed"], batch["labels"])
            likely += (states[::4].to(self.device).float() @ self.head.T).softmax(-1).sum(0)
        contained = torch.cat([batch["labels"][batch["labels"] != IGNORE_INDEX] for batch in self.train])
        top = likely.topk(min(LIKELY, len(likely))).indices
        return torch.cat([top, contained.to(self.device)]).unique()

    def loss(self, network: Network, batch: Batch) -> Tensor:
        """Nats per supervised token, over the small vocabulary."""
        states, targets = self._supervised(network, batch)
        return F.cross_entropy(states @ self.small_head.T, self.place[targets])

    @torch.no_grad()
    def measure(self, network: Network) -> float:
        """Nats per supervised token of the validation rows, over the whole vocabulary."""
        total, tokens = 0.0, 0
        for batch in self.validation:
            states, targets = self._supervised(network, batch)
            total += summed_cross_entropy(lambda x: x @ self.head.T, states, targets, CHUNK, frozen=True).item()
            tokens += len(targets)
        return total / tokens

    def _supervised(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        final = network(batch["taps"].to(self.device), batch["normed"].to(self.device).float())  # (batch, length, d)
        return supervised_positions(final, batch["labels"])

    def steps(self, count: int, seed: int) -> list[Batch]:
        """`count` batches: in the cached order, then in another order every epoch."""
        draw = torch.Generator().manual_seed(seed + 1)
        result = list(self.train)
        while len(result) < count:
            result += [self.train[place] for place in torch.randperm(len(self.train), generator=draw)]
        return result[:count]


def optimizers(network: Network, rates: Rates) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon if it has a rate, over what is trained."""
    up = list(network.side.up.parameters()) if network.side is not None else []
    linear = list(network.linear.parameters()) if network.linear is not None else []
    taken = {id(parameter) for parameter in up + linear}
    rest = [parameter for parameter in trained(network) if id(parameter) not in taken]
    matrices = [parameter for parameter in rest if parameter.dim() == 2] if rates.muon else []
    others = [parameter for parameter in rest if parameter.dim() != 2 or not rates.muon]
    groups = ((up, rates.up or rates.rate), (linear, rates.linear or rates.rate), (others, rates.rate))
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([{"params": parameters, "lr": rate} for parameters, rate in groups if parameters])
    ]
    return [*result, Muon(matrices, rates.muon)] if rates.muon else result


def fit(data: Data, network: Network, rates: Rates, steps: int, seed: int) -> Iterator[tuple[int, float, float]]:
    """Train; a quarter at a time, yields the step, seconds of training so far, and the validation loss."""
    tuned = optimizers(network, rates)
    highest = [(group, group["lr"]) for optimizer in tuned for group in optimizer.param_groups]
    clock = 0.0

    def step(batch: Batch) -> None:
        data.loss(network, batch).backward()
        nn.utils.clip_grad_norm_(trained(network), 1.0)
        for optimizer in tuned:
            optimizer.step()
            optimizer.zero_grad()

    quarters = {steps * part // 4 for part in (1, 2, 3, 4)} - {0}
    for number, batch in enumerate(tqdm(data.steps(steps, seed), unit="step", leave=False)):
        for group, rate in highest:
            group["lr"] = rate * factor(number, steps)
        clock += seconds(lambda batch=batch: step(batch))  # type: ignore[misc]  # a default binds it now
        if number + 1 in quarters:
            yield number + 1, clock, data.measure(network)
