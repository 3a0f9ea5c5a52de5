"""Training from stored states, as the benchmarks do it: the base runs once over its rows, and every seed reads them.

Where the head is most of a step, training takes the softmax over what the base finds likely and what the rows contain,
a tenth of the vocabulary and of the cost. Losses that are reported are over all of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks import methods, rows
from benchmarks.common import DEVICE
from benchmarks.quality.learner import WARM_UP, factor
from qtuning_peft import SideTuningConfig, StatesCollator, compute_states, load_states, model_from_states
from qtuning_peft.head import causal_model
from qtuning_peft.side_tuning.follow.follower import follower_of
from qtuning_peft.side_tuning.follow.replay import from_parts
from qtuning_peft.states.format import Format

RATE, BATCH, LIKELY = 1e-3, 8, 2000


def stored(name: str, found: Sequence[dict[str, Any]], load: Callable[[], Any], **scoring: Any) -> Path:
    """The folder of float32 states of these rows under the base that `load` gives, computed where it is not there."""
    folder = rows.results_file("states").parent / "parts" / "states" / name
    if not (folder / "states.json").is_file():
        dataset = Dataset.from_list(list(found))
        compute_states(dataset, load(), None, SideTuningConfig(), folder, states_format="float32", **scoring)
    return folder


@dataclass
class Rows:
    """States (N + 2, tokens, d) and labels of stored rows, and batches of them as `StatesCollator` makes them.

    Attributes:
        layers: Which blocks' states there are, (N,), int64.
        rows: States and labels (tokens,) of each row.
    """

    layers: Tensor
    rows: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, folder: Path) -> Rows:
        """All rows of a folder."""
        collator = StatesCollator(folder)
        batches = [collator([row]) for row in load_states(folder)]
        rows = [(batch["states"].to(DEVICE), batch["labels"][1:].to(DEVICE)) for batch in batches]
        return cls(torch.tensor(collator.manifest.layers), rows)

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The rows `chosen`."""
        labels = torch.cat([torch.tensor([-100], device=DEVICE), *(self.rows[index][1] for index in chosen)])
        states = torch.cat([self.rows[index][0] for index in chosen], 1)
        return {"states": states, "labels": labels, "state_layers": self.layers}

    def rounded(self, chosen: Format) -> tuple[Rows, float]:
        """The same rows through a format, and its bytes for a token."""
        other, size, tokens = Rows(self.layers, []), 0, 0
        for states, labels in self.rows:
            content = chosen.encode(states.cpu())
            size, tokens = size + len(content), tokens + len(labels)
            other.rows.append((chosen.decode(content, len(states), states.shape[-1]).to(DEVICE), labels))
        return other, size / tokens


@torch.no_grad()
def final_states(model: Any, found: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """By batch, the final hidden states under the side network, (tokens, d), and the targets (tokens,)."""
    follower = follower_of(model)
    assert follower is not None
    for start in range(0, len(found.rows), BATCH):
        batch = found.batch(range(start, min(start + BATCH, len(found.rows))))
        states, targets = from_parts(model, batch["states"], batch["labels"], found.layers.tolist())
        yield states.replay(follower.host.make_listener())["last_hidden_state"].flatten(0, 1), targets


@torch.no_grad()
def predictions(model: Any, found: Rows) -> tuple[Tensor, Tensor]:
    """Error in nats and whether the likeliest token is right, of every supervised token, (tokens,) each."""
    head, errors, right = causal_model(model).get_output_embeddings(), [], []
    for states, targets in final_states(model, found):
        logits = head(states).float()
        errors.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
        right.append(logits.argmax(-1) == targets)
    return torch.cat(errors), torch.cat(right)


@torch.no_grad()
def loss(model: Any, found: Rows) -> float:
    """Nats per supervised token."""
    total = tokens = 0.0
    for start in range(0, len(found.rows), BATCH):
        batch = found.batch(range(start, min(start + BATCH, len(found.rows))))
        count = len(batch["labels"]) - 1
        total, tokens = total + model(**batch).loss.item() * count, tokens + count
    return total / tokens


def fresh(folder: Path, seed: int) -> Any:
    """A side network that has learned nothing: its loss is the base's."""
    torch.manual_seed(seed)
    return model_from_states(folder, SideTuningConfig()).to(DEVICE).train()


Batches = tuple[Iterable[dict[str, Tensor]], int]  # and how many there are


def batches_of(found: Rows, epochs: int, seed: int, size: int = BATCH) -> Batches:
    """Batches of `size` rows, another order every epoch, made when they are asked for."""
    draw, whole = random.Random(seed), len(found.rows) // size * size
    orders = [draw.sample(range(len(found.rows)), len(found.rows)) for _ in range(epochs)]
    places = [order[start : start + size] for order in orders for start in range(0, whole, size)]
    return (found.batch(chosen) for chosen in places), len(places)


def vocabulary_of(model: Any, found: Rows) -> Tensor:
    """Tokens that the base finds likely in a few of the rows, and all that the rows contain, ascending, (tokens,)."""
    head = causal_model(model).get_output_embeddings().weight.detach()  # (vocabulary, d)
    likely = torch.zeros(len(head), device=head.device)
    for states, _ in found.rows[::4]:
        likely += (states[-1, ::4] @ head.T).softmax(-1).sum(0)
    contained = torch.cat([labels for _, labels in found.rows])
    return torch.cat([likely.topk(LIKELY).indices, contained]).unique()


def learn(
    model: Any,
    batches: Batches,
    vocabulary: Tensor | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    warm_up: float = WARM_UP,
) -> None:
    """Take a step on each batch, by AdamW at `RATE` unless there are other `optimizers`, with their rates.

    The softmax is over `vocabulary`, or else over all of it.
    """
    each, steps = batches
    optimizers = [*optimizers] or [methods.optimizer(methods.find("side"), model, RATE)]
    schedules = [LambdaLR(one, lambda step: factor(step, steps, warm_up)) for one in optimizers]
    output = causal_model(model).get_output_embeddings()
    head = output.weight
    if vocabulary is not None:
        output.weight = nn.Parameter(head.detach()[vocabulary], requires_grad=False)
    for batch in tqdm(each, unit="step", total=steps, leave=False):
        labels = batch["labels"]
        if vocabulary is not None:
            labels = torch.where(labels < 0, labels, torch.searchsorted(vocabulary, labels))
        model(**{**batch, "labels": labels}).loss.backward()
        nn.utils.clip_grad_norm_(methods.trained(model), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    output.weight = head
