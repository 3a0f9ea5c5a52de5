"""A side network on a task whose answers are text, from stored states: every rate and seed reads one pass of the base.

    python -m benchmarks.quality.stored_task --task extraction --data FOLDER --rows 2000 --epochs 3

For machines on which the runs of `benchmarks.quality.grid` would take hours. SmolLM2-135M-Instruct in float32; the rate
that is best on the validation rows with the first seed gets all seeds. A row is exact where every token of its answer
is the likeliest one, as greedy generation then gives the answer to the letter. `results/stored_task.jsonl` gets a row
for each network.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import methods, rows
from benchmarks.common import smollm2, smollm2_tokenizer
from benchmarks.quality.from_states import Rows, batches_of, fresh, learn, predictions, stored, vocabulary_of
from benchmarks.quality.tasks import load
from benchmarks.step import positive

NAME = "stored_task"


def measured(model: Any, found: Rows) -> dict[str, float]:
    """Nats per supervised token, and the share of exact rows."""
    errors, right = predictions(model, found)
    of_rows = right.split([len(labels) for _, labels in found.rows])
    return {"loss": errors.mean().item(), "exact": sum(bool(row.all()) for row in of_rows) / len(of_rows)}


def main() -> None:
    """One row for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("extraction", "gsm8k", "dolly"), required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the tasks' files are")
    parser.add_argument("--rows", type=positive, default=2000, help="training rows (2000)")
    parser.add_argument("--epochs", type=positive, default=3, help="of the rows (3)")
    parser.add_argument("--batch", type=positive, default=32, help="rows in a step (32)")
    parser.add_argument("--evaluated-rows", type=positive, default=300, help="validation and test rows each (300)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 5e-4], help="(1e-3 2e-3 5e-4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and weights (0 1 2)")
    arguments = parser.parse_args()
    task = load(arguments.task, smollm2_tokenizer(), arguments.data)
    sets = {"train": task.train[: arguments.rows]}
    sets |= {of: getattr(task, of)[: arguments.evaluated_rows] for of in ("validation", "test")}
    folders = {
        of: stored(f"{arguments.task}-{of}-{len(found)}", found, lambda: smollm2(False)[0])
        for of, found in sets.items()
    }
    parts = {of: Rows.of(folder) for of, folder in folders.items()}
    vocabulary = vocabulary_of(fresh(folders["train"], 0), parts["train"])

    def run(rate: float, seed: int) -> rows.Row:
        key = {"task": arguments.task, "rows": arguments.rows, "epochs": arguments.epochs, "batch": arguments.batch,
               "learning_rate": rate, "seed": seed}  # fmt: skip
        for row in rows.read(NAME):
            if all(row[name] == value for name, value in key.items()):
                return row
        model = fresh(folders["train"], seed)
        batches = batches_of(parts["train"], arguments.epochs, seed, arguments.batch)
        learn(model, batches, vocabulary, [methods.optimizer(methods.find("side"), model, rate)])
        row = key | {of: measured(model, parts[of]) for of in ("validation", "test")} | rows.provenance()
        rows.append(NAME, row)
        print(f"rate {rate:g}, seed {seed}: {row['validation']}")
        return row

    best = min(arguments.rates, key=lambda rate: run(rate, arguments.seeds[0])["validation"]["loss"])
    for seed in arguments.seeds:
        run(best, seed)


if __name__ == "__main__":
    main()
