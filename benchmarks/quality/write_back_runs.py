"""Variants of write-back beside LoRA and a side network that only reads: one row each.

    python -m benchmarks.quality.write_back_runs --data FOLDER --variants read-only last-12 --steps 10 40 --seeds 0 1 2

`last-12` writes behind the last 12 blocks with fitted feedback, `exact-12` with the exact gradient, `constant-12` a
constant vector. Changes follow a `+`, as in `last-12+slow`. SmolLM2-135M-Instruct in float32 on GSM8K, 8 rows in a
step. Rows go to `results/write_back.jsonl`; a run with a row is not repeated, and `--worker K/N` takes every N-th of
those that are left, for N processes at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import methods, rows
from benchmarks.common import smollm2_tokenizer
from benchmarks.quality.learner import Learner, load_base
from benchmarks.quality.tasks import Batch, Task, load
from benchmarks.quality.write_back import Variant, WriteBack
from benchmarks.step import positive, seconds
from qtuning_peft.head import head_of, positions_at_once
from qtuning_peft.loss import CHUNK_ELEMENTS, summed_cross_entropy, supervised_positions
from qtuning_peft.trainer import ROWS

NAME, BATCH = "write_back", 8
TIMED = 10  # steps that the base's bare forward pass takes turns with
ALONE = {"lora": Variant("lora"), "read-only": Variant(), "linear": Variant(network=False)}
BEHIND: dict[str, dict[str, Any]] = {"last": {}, "constant": {"rank": 0}, "exact": {"feedback": "exact"}}
CHANGES: dict[str, dict[str, Any]] = {
    "linear": {"network": False}, "slow": {"pace": 0.3}, "refit": {"refit_every": 20}, "one-exact": {"exact_rows": 1},
}  # fmt: skip


def variant_of(name: str) -> Variant:
    """The variant called `name`, as `last-12` or, with changes, `last-12+slow+refit`; a `ValueError` for any other."""
    first, *changes = name.split("+")
    found = re.fullmatch(f"({'|'.join(BEHIND)})-([1-9][0-9]*)", first)
    if not (found or first in ALONE) or not {*changes} <= {*CHANGES}:
        names = ", ".join([*ALONE, *(f"{kind}-N" for kind in BEHIND)])
        raise ValueError(f"variant is {name}; give one of {names}, with any of +{', +'.join(CHANGES)}.")
    variant = Variant(blocks=int(found[2]), **BEHIND[found[1]]) if found else ALONE[first]
    return replace(variant, **{field: value for change in changes for field, value in CHANGES[change].items()})


def planned(arguments: argparse.Namespace) -> list[rows.Row]:
    """What identifies each run, beside the machine; the first seed's first."""
    choices = itertools.product(
        arguments.seeds, arguments.few_shot, arguments.steps, arguments.variants, arguments.rates
    )
    return [
        {
            "model": "SmolLM2-135M-Instruct", "task": "gsm8k", "variant": name, "options": asdict(variant_of(name)),
            "learning_rate": rate, "seed": seed, "few_shot_examples": few_shot, "steps": steps,
            "rows": steps * BATCH, "batch": BATCH, "evaluated_rows": arguments.evaluated_rows,
        }
        for seed, few_shot, steps, name, rate in choices
    ]  # fmt: skip


def key(row: rows.Row) -> str:
    """Of the part of a row that `planned` makes."""
    names = ("variant", "learning_rate", "seed", "few_shot_examples", "steps", "evaluated_rows")
    return json.dumps([row[name] for name in names], sort_keys=True)


def train(run: rows.Row, task: Task, base: Any) -> rows.Row:
    """What `run` gives; `base` is as it was afterwards, and LoRA is given one of its own."""
    variant, seed, steps = variant_of(run["variant"]), run["seed"], run["steps"]
    batches = [task.batch(part) for part in task.epochs(run["rows"], BATCH, 1, seed)]
    parts = {"validation": task.validation, "test": task.test}
    evaluated = {name: task.evaluated(part[: run["evaluated_rows"]], BATCH) for name, part in parts.items()}
    times: list[float] = []
    forwards: list[float] = []
    found: rows.Row = {}
    learner: Learner | WriteBack
    if variant.method is not None:
        learner = Learner(methods.find(variant.method), task, run["learning_rate"], steps, seed)
    else:
        torch.manual_seed(seed)
        arguments = {} if variant.network else {"layers_to_transform": [len(base.get_decoder().layers) - 1]}
        side = methods.apply(replace(methods.find("side"), arguments=arguments), base)
        learner = WriteBack(variant, side, task, run["learning_rate"], steps, seed)
    try:
        if isinstance(learner, WriteBack):
            found["loss_at_start"] = learner.measure(evaluated["validation"])
            learner.prepare()
            found["cosines_at_start"] = learner.cosines(evaluated["validation"][0]) if variant.blocks else None
        for batch in batches:
            before = learner.clock
            learner.step(batch)
            times.append(learner.clock - before)
            if isinstance(learner, WriteBack) and len(forwards) < TIMED:
                forwards.append(seconds(lambda: base_forward(learner, batch)))  # noqa: B023  (called here)
        found |= {name: learner.measure(part) for name, part in evaluated.items()}
        if isinstance(learner, WriteBack):
            found["cosines_at_end"] = learner.cosines(evaluated["validation"][0]) if variant.blocks else None
            found["curve"] = [round(value, 4) for value in torch.stack(learner.losses).tolist()]
            found["fit_seconds"] = learner.fit_clock
            warm = list(zip(times, forwards, strict=False))[2:] or [(times[0], forwards[0])]
            found["base_forward_seconds"] = median(forward for _, forward in warm)
            found["step_over_forward"] = median(step / forward for step, forward in warm)
    finally:
        if isinstance(learner, WriteBack):
            learner.model.unload()
    count = sum(parameter.numel() for parameter in getattr(learner, "trained", methods.trained(learner.model)))
    return {**found, "trained_parameters": count, "seconds": learner.clock, "step_seconds": median(times)}


@torch.no_grad()
def base_forward(learner: WriteBack, batch: Batch) -> None:
    """The base's bare pass over the tokens of a step, and its loss."""
    inputs, labels = learner.inputs(batch)
    output = learner.follower.run(None, **inputs)
    states, targets = supervised_positions(output.last_hidden_state, labels.to(learner.device))
    chunk = positions_at_once(learner.base, CHUNK_ELEMENTS)
    summed_cross_entropy(head_of(learner.base, output), states, targets, chunk, frozen=True)


def main() -> None:
    """Run what has no row yet; one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the task's files are")
    parser.add_argument("--variants", nargs="+", required=True, metavar="NAME", help="as last-12 or last-12+slow+refit")
    parser.add_argument("--steps", type=positive, nargs="+", default=[10, 40, 160], help="of 8 rows (10 40 160)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="learning rates (1e-3)")
    parser.add_argument("--few-shot", type=int, nargs="+", default=[0], help="numbers of few-shot examples (0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data order and new weights (0)")
    parser.add_argument("--evaluated-rows", type=positive, default=100, help="of validation and test set (100)")
    parser.add_argument("--worker", default="0/1", metavar="K/N", help="the K-th of N processes (0/1)")
    arguments = parser.parse_args()
    worker, workers = map(int, arguments.worker.split("/"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    done = {key(row) for row in rows.read(NAME) if "error" not in row}
    try:
        left = [run for run in planned(arguments) if key(run) not in done]
    except ValueError as error:
        parser.error(str(error))
    # Along diagonals, so that no process has the slowest variant of every group.
    mine = [run for index, run in enumerate(left) if (index + index // workers) % workers == worker]
    if not mine:
        return
    most = max(arguments.evaluated_rows, ROWS, *(run["rows"] for run in mine))
    tokenizer = smollm2_tokenizer()
    numbers = {run["few_shot_examples"] for run in mine}
    tasks = {number: load("gsm8k", tokenizer, arguments.data, number, most) for number in numbers}
    base, source = load_base(next(iter(tasks.values())), False, 0), rows.provenance()
    for run in tqdm(mine, f"worker {worker}", unit="run"):
        try:
            found = train(run, tasks[run["few_shot_examples"]], base)
        except RuntimeError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        finite = all(not isinstance(value, float) or math.isfinite(value) for value in found.values())
        row = {**run, **found, "diverged": not finite or found.get("validation", 0) > found.get("loss_at_start", 99)}
        rows.append(NAME, {name: _finite(value) for name, value in row.items()} | source)
        shown = {name: row.get(name) for name in ("variant", "learning_rate", "seed", "few_shot_examples", "steps")}
        tqdm.write(
            f"{shown}: {found.get('validation')} {found.get('test')} {found.get('seconds')} {found.get('error')}"
        )


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
