"""What each format of stored states costs: bytes for a supervised token, and the loss after training from it.

    python -m benchmarks.quality.formats --data FOLDER

SmolLM2-135M-Instruct in float32 on GSM8K. The base runs once, over training, validation and test rows; their states are
kept beside the results. Every format encodes and decodes the training rows' states; validation and test rows are read
as computed, which is as the adapter would meet them live. Rows go to `results/formats.jsonl`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import methods, rows
from benchmarks.common import smollm2, smollm2_tokenizer
from benchmarks.quality.learner import factor
from benchmarks.quality.tasks import load
from benchmarks.step import positive
from qtuning_peft import SideTuningConfig, StatesCollator, compute_states, load_states, model_from_states
from qtuning_peft.states.format import FORMATS, Format
from qtuning_peft.states.projection import Projection, format_of

NAME = "formats"
RATE, BATCH = 1e-3, 8
PROJECTED = "projection, {} channels"
FIRST = 32  # rows that a projection is fitted to


def stored(name: str, found: Sequence[dict[str, Any]]) -> Path:
    """The folder of states of these rows, computed where it is not there."""
    folder = rows.results_file(NAME).parent / "parts" / "states" / name
    if not (folder / "states.json").is_file():
        compute_states(Dataset.from_list(list(found)), smollm2(False)[0], None, SideTuningConfig(), folder,
                       states_format="float32")  # fmt: skip
    return folder


class Rows:
    """States (N + 2, tokens, d) and labels of stored rows, and batches of them as `StatesCollator` makes them."""

    def __init__(self, folder: Path) -> None:
        collator = StatesCollator(folder)
        self.layers = torch.tensor(collator.manifest.layers)
        batches = [collator([row]) for row in load_states(folder)]
        self.rows: list[tuple[Tensor, Tensor]] = [(batch["states"], batch["labels"][1:]) for batch in batches]

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The rows `chosen`."""
        labels = torch.cat([torch.tensor([-100]), *(self.rows[index][1] for index in chosen)])
        states = torch.cat([self.rows[index][0] for index in chosen], 1)
        return {"states": states, "labels": labels, "state_layers": self.layers}

    def rounded(self, chosen: Format) -> tuple[Rows, float]:
        """The same rows through a format, and its bytes for a token."""
        other, size, tokens = object.__new__(Rows), 0, 0
        other.layers, other.rows = self.layers, []
        for states, labels in self.rows:
            content = chosen.encode(states)
            size, tokens = size + len(content), tokens + len(labels)
            other.rows.append((chosen.decode(content, len(states), states.shape[-1]), labels))
        return other, size / tokens


@torch.no_grad()
def loss(model: Any, found: Rows) -> float:
    """Nats per supervised token."""
    total = tokens = 0.0
    for start in range(0, len(found.rows), BATCH):
        batch = found.batch(range(start, min(start + BATCH, len(found.rows))))
        count = len(batch["labels"]) - 1
        total, tokens = total + model(**batch).loss.item() * count, tokens + count
    return total / tokens


def train(folder: Path, found: Rows, epochs: int, seed: int) -> Any:
    """A side network that has learned `found`."""
    torch.manual_seed(seed)
    model = model_from_states(folder, SideTuningConfig()).train()
    optimizer = methods.optimizer(methods.find("side"), model, RATE)
    draw, steps = random.Random(seed), epochs * (len(found.rows) // BATCH)
    for step in tqdm(range(steps), f"seed {seed}", unit="step"):
        if step % (len(found.rows) // BATCH) == 0:
            order = draw.sample(range(len(found.rows)), len(found.rows))
        start = step % (len(found.rows) // BATCH) * BATCH
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor(step, steps)
        model(**found.batch(order[start : start + BATCH])).loss.backward()
        nn.utils.clip_grad_norm_(methods.trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    """One row for each format and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where GSM8K's files are")
    parser.add_argument("--rows", type=positive, default=160, help="training rows (160)")
    parser.add_argument("--epochs", type=positive, default=2, help="epochs (2)")
    parser.add_argument("--channels", type=positive, nargs="*", default=[32, 64, 128, 256], help="of projections")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and weights (0 1 2)")
    arguments = parser.parse_args()
    task = load("gsm8k", smollm2_tokenizer(), arguments.data, 0)
    folders = {
        part: stored(f"{part}-{len(found)}", found)
        for part, found in {
            "train": task.train[: arguments.rows], "validation": task.validation[:32], "test": task.test[:60]
        }.items()
    }  # fmt: skip
    parts = {part: Rows(folder) for part, folder in folders.items()}
    formats = dict(FORMATS.items())
    first = torch.cat([states for states, _ in parts["train"].rows[:FIRST]], dim=1)
    for channels in arguments.channels:
        formats[PROJECTED.format(channels)] = format_of("projection", Projection.fit(first, channels))
    for name, chosen in formats.items():
        rounded, size = parts["train"].rounded(chosen)
        for seed in arguments.seeds:
            model = train(folders["train"], rounded, arguments.epochs, seed)
            row = {
                "format": name, "bytes_per_token": size, "task": task.name, "rows": arguments.rows,
                "epochs": arguments.epochs, "learning_rate": RATE, "seed": seed,
                "loss": {part: loss(model, parts[part]) for part in ("validation", "test")},
            }  # fmt: skip
            rows.append(NAME, row | rows.provenance())
            tqdm.write(f"{name}: {size:.0f} bytes a token, validation {row['loss']['validation']:.4f} nats")


if __name__ == "__main__":
    main()
