"""What each format of stored states costs: bytes for a supervised token, and the loss after training from it.

    python -m benchmarks.quality.formats --data FOLDER

SmolLM2-135M-Instruct in float32 on GSM8K. The base runs once, over training, validation and test rows; their states are
kept beside the results. Every format encodes and decodes the training rows' states; validation and test rows are read
as computed, which is as the adapter would meet them live. Rows go to `results/formats.jsonl`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import rows
from benchmarks.common import smollm2, smollm2_tokenizer
from benchmarks.quality.from_states import RATE, Rows, batches_of, fresh, learn, loss, stored
from benchmarks.quality.tasks import load
from benchmarks.step import positive
from qtuning_peft.states.format import FORMATS
from qtuning_peft.states.projection import Projection, format_of

NAME = "formats"
PROJECTED = "projection, {} channels"
FIRST = 32  # rows that a projection is fitted to


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
        part: stored(f"{part}-{len(found)}", found, lambda: smollm2(False)[0])
        for part, found in {
            "train": task.train[: arguments.rows], "validation": task.validation[:32], "test": task.test[:60]
        }.items()
    }  # fmt: skip
    parts = {part: Rows.of(folder) for part, folder in folders.items()}
    formats = dict(FORMATS.items())
    first = torch.cat([states for states, _ in parts["train"].rows[:FIRST]], dim=1)
    for channels in arguments.channels:
        formats[PROJECTED.format(channels)] = format_of("projection", Projection.fit(first, channels))
    for name, chosen in formats.items():
        rounded, size = parts["train"].rounded(chosen)
        for seed in arguments.seeds:
            model = fresh(folders["train"], seed)
            learn(model, batches_of(rounded, arguments.epochs, seed))
            row = {
                "format": name, "bytes_per_token": size, "task": task.name, "rows": arguments.rows,
                "epochs": arguments.epochs, "learning_rate": RATE, "seed": seed,
                "loss": {part: loss(model, parts[part]) for part in ("validation", "test")},
            }  # fmt: skip
            rows.append(NAME, row | rows.provenance())
            tqdm.write(f"{name}: {size:.0f} bytes a token, validation {row['loss']['validation']:.4f} nats")


if __name__ == "__main__":
    main()
