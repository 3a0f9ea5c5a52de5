"""Which quantized base to choose: what each loses, weighs and takes, and what a side network learns beside it.

    python -m benchmarks.quality.quantized_bases --data FOLDER --bases "bitsandbytes NF4" "HQQ, 4 bits"

SmolLM2-135M-Instruct on GSM8K. Quantized layers are slow on a CPU, and a calibrated one multiplies by a weight like any
other: the weights are read off, the float32 model runs once over the rows with them, and all seeds train from its
states. A fresh side network changes nothing, so its loss is the base's. Forwards of one text of 256 tokens through the
quantized layers are timed in turn with those of a float32 base, and only their ratio is kept. Rows go to
`results/quantized_bases.jsonl`. Bases that need calibration see 32 training questions with their answers, and are kept
beside the checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import rows
from benchmarks.common import checkpoint, smollm2_tokenizer
from benchmarks.quality.from_states import RATE, Rows, batches_of, fresh, learn, loss, stored
from benchmarks.quality.tasks import Task, load
from benchmarks.quantizers import QUANTIZERS, auto_round, full_precision, gptq, stored_bytes
from benchmarks.step import positive, seconds

NAME = "quantized_bases"
CALIBRATED = {"GPTQ, 4 bits": partial(gptq, texts=32), "AutoRound W4A16": partial(auto_round, texts=32, steps=20)}
FLOAT32 = "float32"
SAME = 0.01  # of logits, for layers that compute in 16 bits


def load_named(name: str) -> Any:
    """The whole model in the quantization called `name`."""
    folder = checkpoint()
    if name == FLOAT32:
        return full_precision(folder)
    kept = folder.parent / "parts" / f"calibrated-{name.partition(',')[0].replace(' ', '-').lower()}"
    return CALIBRATED.get(name, QUANTIZERS[name].load)(folder, kept)


@torch.no_grad()
def dense(base: Any) -> Any:
    """The float32 model with the weights that the layers of `base` multiply by, which the identity makes them tell."""
    model = load_named(FLOAT32)
    for path, module in model.named_modules():
        own = base.get_submodule(path)
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            told = own(torch.eye(module.in_features, dtype=base.dtype)[None])[0]  # (in, out)
            module.weight.copy_(told.T)
        elif not [*module.children()] and module is not model.lm_head:  # which is the embeddings
            for parameter, given in zip(module.parameters(), own.parameters(), strict=True):
                parameter.copy_(given)
    ids = torch.arange(100, 356)[None]
    expected = base(ids).logits.float()
    error = ((model(ids).logits - expected).norm() / expected.norm()).item()
    if error > SAME:
        raise ValueError(f"error is {error}: a layer of {type(base).__name__} does more than multiply by a weight.")
    return model


@torch.no_grad()
def relative_speed(base: Any, reference: Any, repeats: int) -> float:
    """Tokens per second of a forward, over those of `reference`."""
    ids = torch.arange(100, 356)[None]
    times = [(seconds(lambda: base(ids)), seconds(lambda: reference(ids))) for _ in range(repeats + 1)][1:]
    return median(of_reference for _, of_reference in times) / median(of_base for of_base, _ in times)


def measure(name: str, task: Task, arguments: argparse.Namespace) -> Iterator[rows.Row]:
    """One base: bytes, speed, its own loss, and for each seed the loss after training from its states."""
    base = load_named(name)
    loaded = stored_bytes(base)
    speed = relative_speed(base, load_named(FLOAT32), arguments.repeats) if arguments.repeats else None
    sets = {
        "train": task.train[: arguments.rows],
        "validation": task.validation[: arguments.validation_rows],
        "test": task.test[: arguments.test_rows],
    }
    prefix = name.replace(" ", "-").replace(",", "").lower()
    model = dense(base)
    folders = {of: stored(f"{prefix}-{of}-{len(found)}", found, lambda: model) for of, found in sets.items()}
    parts = {of: Rows.of(folder) for of, folder in folders.items()}
    untrained = fresh(folders["train"], 0)
    before = {of: loss(untrained, parts[of]) for of in ("validation", "test")}
    for seed in arguments.seeds:
        trained = fresh(folders["train"], seed)
        learn(trained, batches_of(parts["train"], arguments.epochs, seed))
        yield {
            "base": name, "package": QUANTIZERS[name].version() if name in QUANTIZERS else None, "task": task.name,
            "bytes": loaded, "running_bytes": stored_bytes(base), "speed": speed, "rows": arguments.rows,
            "epochs": arguments.epochs, "validation_rows": arguments.validation_rows,
            "test_rows": arguments.test_rows, "learning_rate": RATE, "seed": seed, "base_loss": before,
            "loss": {of: loss(trained, parts[of]) for of in before},
        }  # fmt: skip


def main() -> None:
    """One row for each base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where GSM8K's files are")
    parser.add_argument("--bases", nargs="+", required=True, choices=[FLOAT32, *QUANTIZERS], metavar="BASE")
    parser.add_argument("--rows", type=positive, default=80, help="training rows (80)")
    parser.add_argument("--epochs", type=positive, default=2, help="epochs (2)")
    parser.add_argument("--validation-rows", type=positive, default=32, help="validation rows (32)")
    parser.add_argument("--test-rows", type=positive, default=60, help="test rows (60)")
    parser.add_argument("--repeats", type=int, default=5, help="forwards that are timed (5); 0 on a busy machine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and weights (0 1 2)")
    arguments = parser.parse_args()
    task = load("gsm8k", smollm2_tokenizer(), arguments.data, 0)
    for name in arguments.bases:
        for row in measure(name, task, arguments):
            rows.append(NAME, row | rows.provenance())
            of_base, trained = row["base_loss"]["validation"], row["loss"]["validation"]
            tqdm.write(f"{name}: {of_base:.4f} nats, trained {trained:.4f}")


if __name__ == "__main__":
    main()
