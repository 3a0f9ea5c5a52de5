"""What each method learns from the same data, and in what time: one row per method and seed.

    python -m benchmarks.quality.train --task gsm8k --data FOLDER --methods side=2e-3 lora=5e-4 --rows 400

SmolLM2-135M-Instruct, or the base in another folder. Methods take their steps in turn. A method may have its own
configuration, as in `side(reduction_factor=4,downsample=linear)=2e-3`, a base in float32, as in `side(four_bit=False)`,
and few-shot examples before every row, as in `side(few_shot_examples=4)`. Rows go to `results/quality.jsonl`, each with
its whole curve. A run whose row is there already, from such a machine, is not repeated, so that a stopped command
resumes.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks import methods, rows
from benchmarks.common import checkpoint, environment
from benchmarks.quality.learner import Learner
from benchmarks.quality.tasks import Task, load
from benchmarks.quality.texts import TASKS
from benchmarks.step import positive

NAME = "quality"
BASE = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Entrant:
    """A method, its learning rate, and the number of few-shot examples before every row."""

    method: methods.Method
    rate: float
    few_shot_examples: int = 0


def parse(text: str) -> Entrant:
    """An entrant from `NAME`, `NAME=RATE` or `NAME(FIELD=VALUE,...)=RATE`.

    Raises:
        ValueError: when it is no such text, or names no method.
    """
    found = re.fullmatch(r"([\w-]+)(?:\((.*)\))?(?:=([\d.eE+-]+))?", text)
    if found is None:
        raise ValueError(f"method is {text}; give NAME, NAME=RATE or NAME(FIELD=VALUE,...)=RATE.")
    method = methods.find(found[1])
    parts = re.split(r",(?![^\[]*\])", found[2]) if found[2] else []
    given = {name: _value(value) for name, _, value in (part.partition("=") for part in parts)}
    few_shot_examples = given.pop("few_shot_examples", 0)
    four_bit = given.pop("four_bit", method.four_bit)
    method = replace(method, four_bit=four_bit, arguments={**method.arguments, **given})
    return Entrant(method, float(found[3] or method.learning_rate), few_shot_examples)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text, text)


def key(row: rows.Row) -> str:
    """What identifies a run, beside the machine."""
    names = (
        "task",
        "model",
        "method",
        "options",
        "learning_rate",
        "few_shot_examples",
        "seed",
        "rows",
        "epochs",
        "batch",
    )
    return json.dumps({name: row.get(name, 0) for name in names}, sort_keys=True)


def run_of(entrant: Entrant, seed: int, arguments: argparse.Namespace) -> rows.Row:
    """What a run's row says before it has run."""
    return {
        "task": arguments.task, "model": arguments.base.name if arguments.base else BASE, "method": entrant.method.name,
        "options": entrant.method.options(), "learning_rate": entrant.rate,
        "few_shot_examples": entrant.few_shot_examples, "seed": seed, "rows": arguments.rows,
        "epochs": arguments.epochs, "batch": arguments.batch, "validation_rows": arguments.validation_rows,
        "test_rows": arguments.test_rows, "workers": arguments.workers, "states": arguments.states is not None,
    }  # fmt: skip


def is_done(run: rows.Row, workers: int) -> bool:
    """Whether a machine like this one has measured `run`; alone, if this is to be done alone."""
    device = environment()["device"]
    return any(
        key(row) == key(run)
        and row["environment"]["device"] == device
        and (row["test"] is not None or not run["test_rows"])
        and (workers > 1 or row.get("workers", 1) == 1)
        for row in rows.read(NAME)
    )


@cache
def read(name: str, folder: Path | None, few_shot_examples: int, most: int, base: Path | None) -> Task:
    """The task in the tokens of `base`, once for several runs in one process."""
    return load(name, AutoTokenizer.from_pretrained(base or checkpoint()), folder, few_shot_examples, most)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--task", choices=TASKS, required=True)
    result.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the tasks' files are")
    result.add_argument("--base", type=Path, metavar="FOLDER", help=f"a model with a chat template ({BASE})")
    result.add_argument("--methods", nargs="+", required=True, metavar="METHOD", help="NAME(FIELD=VALUE,...)=RATE")
    result.add_argument("--rows", type=positive, default=400, help="training rows (400)")
    result.add_argument("--epochs", type=float, default=1, help="how often they are read (1)")
    result.add_argument("--batch", type=positive, default=8, help="rows in a step (8)")
    result.add_argument("--evaluate-every", type=positive, metavar="STEPS", help="steps between (only at the end)")
    result.add_argument("--validation-rows", type=positive, default=100, help="rows of an evaluation (100)")
    result.add_argument("--test-rows", type=positive, metavar="ROWS", help="test rows, evaluated at the end (none)")
    result.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data order and new weights (0)")
    result.add_argument("--states", type=Path, metavar="FOLDER", help="side networks keep the base's states there, and "
                        "later runs read them: their times are not comparable (none)")  # fmt: skip
    result.add_argument("--workers", type=positive, default=1, help="processes that train on this machine now (1)")
    return result


def main(words: list[str] | None = None) -> None:
    """Train in turn; one row each. `words` are the command's, unless given."""
    options = parser()
    arguments = options.parse_args(words)
    try:
        wanted = [parse(text) for text in arguments.methods]
        sizes = {"rows": "train", "validation_rows": "validation", "test_rows": "test"}
        most = max(getattr(arguments, name) or 0 for name in sizes)
        numbers = {entrant.few_shot_examples for entrant in wanted}
        tasks = {number: read(arguments.task, arguments.data, number, most, arguments.base) for number in numbers}
        for name, part in sizes.items():
            found = len(getattr(tasks[max(numbers)], part))
            if (getattr(arguments, name) or 0) > found:
                raise ValueError(f"{name} is {getattr(arguments, name)}; {arguments.task} has {found} of them.")
    except ValueError as error:
        options.error(str(error))

    for seed in arguments.seeds:
        train(tasks, wanted, seed, arguments)


def train(tasks: dict[int, Task], wanted: list[Entrant], seed: int, arguments: argparse.Namespace) -> None:
    """One seed of every method that has no row yet; `tasks` by their number of few-shot examples."""
    # Another number of few-shot examples changes no row's place: all rows are longer by the same tokens.
    batches = {
        number: task.epochs(arguments.rows, arguments.batch, arguments.epochs, seed) for number, task in tasks.items()
    }
    steps = len(next(iter(batches.values())))
    runs = [(run_of(entrant, seed, arguments), entrant) for entrant in wanted]
    left = [(run | {"steps": steps}, entrant) for run, entrant in runs if not is_done(run, arguments.workers)]
    if not left:
        return
    learners = [
        (run, Learner(entrant.method, tasks[entrant.few_shot_examples], entrant.rate, steps, seed, arguments.epochs,
                      arguments.base, states=arguments.states))
        for run, entrant in left
    ]  # fmt: skip
    source = rows.provenance()
    curves: list[list[list[float]]] = [[] for _ in learners]

    def evaluate() -> None:
        for curve, (run, learner) in zip(curves, learners, strict=True):
            task = learner.task
            value = learner.measure(task.evaluated(task.validation[: arguments.validation_rows], arguments.batch))
            curve.append([learner.step_number, learner.tokens, round(learner.clock, 3), round(value, 5)])
            tqdm.write(f"{run['method']} {run['learning_rate']:g} seed {seed}: step {curve[-1]}")

    for step in tqdm(range(steps), f"{arguments.task}, seed {seed}", unit="step"):
        for run, learner in learners:
            learner.step(learner.task.batch(batches[run["few_shot_examples"]][step]))
        if arguments.evaluate_every and (step + 1) % arguments.evaluate_every == 0 and step + 1 < steps:
            evaluate()
    evaluate()
    for curve, (run, learner) in zip(curves, learners, strict=True):
        test = None
        if arguments.test_rows:
            task = learner.task
            test = learner.measure(task.evaluated(task.test[: arguments.test_rows], arguments.batch))
        trained = sum(parameter.numel() for parameter in methods.trained(learner.model))
        rows.append(
            NAME,
            {
                **run, "trained_parameters": trained, "tokens": learner.tokens, "seconds": learner.clock,
                # Several share the process, and its memory.
                "peak_allocated": learner.peak if len(learners) == 1 and learner.peak else None,
                "curve": curve, "validation": curve[-1][-1], "test": test,
                "exact": learner.exact if arguments.test_rows else None,
                "majority": majority(learner.task, arguments.test_rows), **source,
            },
        )  # fmt: skip


def majority(task: Task, test_rows: int | None) -> float | None:
    """Accuracy of who always names the test rows' larger class."""
    if task.labels is None or not test_rows:
        return None
    counts = Counter(row["labels"] for row in task.test[:test_rows])
    return max(counts.values()) / sum(counts.values())


if __name__ == "__main__":
    main()
