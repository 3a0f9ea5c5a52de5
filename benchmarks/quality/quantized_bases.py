"""Which quantized base to choose: what each loses, weighs and takes, and what a side network learns beside it.

    python -m benchmarks.quality.quantized_bases --data FOLDER --bases "bitsandbytes NF4" "HQQ, 4 bits"

SmolLM2-135M-Instruct on GSM8K. A fresh side network changes nothing, so its loss is the base's. Forwards of one text of
256 tokens are timed in turn with those of a float32 base, and only their ratio is kept. Rows go to
`results/quantized_bases.jsonl`. Calibrated bases are kept beside the checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import methods, rows
from benchmarks.common import checkpoint, smollm2_tokenizer
from benchmarks.quality.learner import Learner
from benchmarks.quality.tasks import Task, load
from benchmarks.quantizers import QUANTIZERS, full_precision, stored_bytes
from benchmarks.step import positive, seconds

NAME = "quantized_bases"
FLOAT32 = "float32"
RATE = 1e-3
BATCH = 8


def load_named(name: str) -> Any:
    """The whole model in the quantization called `name`."""
    folder = checkpoint()
    if name == FLOAT32:
        return full_precision(folder)
    kept = folder.parent / "parts" / name.partition(",")[0].replace(" ", "-").lower()
    return QUANTIZERS[name].load(folder, kept)


@torch.no_grad()
def relative_speed(base: Any, reference: Any, repeats: int) -> float:
    """Tokens per second of a forward, over those of `reference`."""
    ids = torch.arange(100, 356)[None]
    times = [(seconds(lambda: base(ids)), seconds(lambda: reference(ids))) for _ in range(repeats + 1)][1:]
    return median(of_reference for _, of_reference in times) / median(of_base for of_base, _ in times)


def measure(name: str, task: Task, reference: Any, arguments: argparse.Namespace) -> rows.Row:
    """One base: bytes, speed, its own loss, and the loss after training a side network on the first `rows` rows."""
    base = load_named(name)
    loaded = stored_bytes(base)
    speed = relative_speed(base, reference, arguments.repeats)
    batches = task.epochs(arguments.rows, BATCH, 1, arguments.seed) if arguments.rows else []
    learner = Learner(methods.find("side"), task, RATE, len(batches), arguments.seed, base=base)
    validation = task.evaluated(task.validation[: arguments.validation_rows], BATCH)
    before = learner.measure(validation)
    for batch in tqdm(batches, name, unit="step"):
        learner.step(task.batch(batch))
    return {
        "base": name, "package": QUANTIZERS[name].version() if name in QUANTIZERS else None, "task": task.name,
        "bytes": loaded, "running_bytes": stored_bytes(base), "speed": speed, "rows": arguments.rows,
        "validation_rows": arguments.validation_rows, "learning_rate": RATE, "seed": arguments.seed,
        "base_loss": before, "loss": learner.measure(validation) if batches else None,
    }  # fmt: skip


def main() -> None:
    """One row for each base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where GSM8K's files are")
    parser.add_argument("--bases", nargs="+", required=True, choices=[FLOAT32, *QUANTIZERS], metavar="BASE")
    parser.add_argument("--rows", type=int, default=80, help="training rows; none: the bases alone (80)")
    parser.add_argument("--validation-rows", type=positive, default=32, help="rows of an evaluation (32)")
    parser.add_argument("--repeats", type=positive, default=5, help="forwards that are timed (5)")
    parser.add_argument("--seed", type=int, default=0, help="of data order and new weights (0)")
    arguments = parser.parse_args()
    task = load("gsm8k", smollm2_tokenizer(), arguments.data, 0)
    reference = load_named(FLOAT32)
    for name in arguments.bases:
        row = measure(name, task, reference, arguments)
        rows.append(NAME, row | rows.provenance())
        trained = "" if row["loss"] is None else f", after training {row['loss']:.4f}"
        tqdm.write(f"{name}: {row['base_loss']:.4f} nats{trained}, {row['speed']:.2f} of the speed of float32")


if __name__ == "__main__":
    main()
