"""The tasks of the quality benchmark, side networks beside LoRA: many runs in several processes on one machine.

    python -m benchmarks.quality.grid rates seeds gsm8k --data FOLDER --workers 8 --minutes 2 1 1

Stages, in the order given, each most important runs first: `rates` tries five learning rates of every method on every
task, one seed, validation rows alone; `seeds` runs the best of them with three seeds and test rows; `gsm8k` compares
10, 40 and 160 steps, with few-shot examples and without. Rows are those of `benchmarks.quality.train`. It resumes: a
run that has its row is not repeated. Ends with status 75 if time is up and runs are left.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import rows
from benchmarks.common import checkpoint, environment
from benchmarks.grid import TIME_IS_UP
from benchmarks.quality import train
from benchmarks.quality.targets import ACCURACY
from benchmarks.step import positive

LORA, SIDE = ("lora", "qlora"), ("side(four_bit=False)", "side")
FULL, NF4 = (LORA[0], SIDE[0]), (LORA[1], SIDE[1])
RATES = ((1e-3, 2e-3, 5e-4), (4e-3, 2e-4))  # the middle ones first
SEEDS = (0, 1, 2)
# Test rows; epochs of a side network: from the hidden-state cache, which does not pay for long rows; rows in a step.
TASKS = {"sst2": (1800, 3, 32), "mrpc": (1700, 3, 32), "extraction": (300, 3, 32), "reward": (300, 1, 16),
         "cola": (500, 3, 32), "rte": (270, 3, 32), "intent": (300, 3, 32)}  # fmt: skip
GSM8K = (80, 320, 1280)  # rows, 8 in a step


@dataclass(frozen=True)
class Run:
    """One run of `benchmarks.quality.train`; `rate` is none where it is the best of those that were tried."""

    task: str
    method: str
    rate: float | None
    rows: int = 2000
    epochs: int = 1
    batch: int = 32
    seed: int = 0
    test_rows: int | None = None
    validation_rows: int = 300

    def words(self) -> list[str]:
        """Of the command."""
        names = ("task", "rows", "epochs", "batch", "validation_rows", "test_rows")
        given = [(f"--{name.replace('_', '-')}", getattr(self, name)) for name in names]
        options = [str(word) for option in given if option[1] is not None for word in option]
        return [*options, "--seeds", str(self.seed), "--methods", f"{self.method}={self.rate:g}"]

    def is_done(self, extra: list[str], workers: int) -> bool:
        """Whether its row is there."""
        arguments = train.parser().parse_args([*self.words(), *extra])
        return train.is_done(train.run_of(train.parse(arguments.methods[0]), self.seed, arguments), workers)

    def at_best_rate(self) -> Run | None:
        """The same at the rate with the best result on validation rows; none where none was tried on this machine."""
        entrant, device = train.parse(self.method), environment()["device"]
        wanted = {
            "task": self.task, "method": entrant.method.name, "options": entrant.method.options(), "rows": self.rows,
            "epochs": self.epochs, "batch": self.batch, "few_shot_examples": entrant.few_shot_examples, "seed": 0,
        }  # fmt: skip
        found = [
            row
            for row in rows.read(train.NAME)
            if row["environment"]["device"] == device and all(row.get(name) == value for name, value in wanted.items())
        ]
        best = max if self.task in ACCURACY else min
        return replace(self, rate=best(found, key=lambda row: row["validation"])["learning_rate"]) if found else None


def _of(task: str, method: str) -> dict[str, int]:
    _, epochs, batch = TASKS[task]
    return {"epochs": epochs if method in SIDE else 1, "batch": batch}


def rates() -> list[Run]:
    """Five of every method on every task: float32 first, and the outer rates last."""
    order = product(RATES, (FULL, NF4), TASKS)
    return [
        Run(task, method, rate, **_of(task, method))
        for some, methods, task in order
        for method, rate in product(methods, some)
    ]


def seeds() -> list[Run]:
    """The best rates, three seeds."""
    order = product((FULL, NF4), TASKS, SEEDS)
    runs = [
        Run(task, method, None, **_of(task, method), seed=seed, test_rows=TASKS[task][0])
        for methods, task, seed in order
        for method in methods
    ]
    return [best for run in runs if (best := run.at_best_rate()) is not None]


def gsm8k() -> list[Run]:
    """10, 40 and 160 steps, without few-shot examples and behind four: each method at the rate that `train` found."""
    full = {
        "lora": 3e-3,
        "lora(few_shot_examples=4)": 3e-3,
        SIDE[0]: 1e-3,
        "side(four_bit=False,few_shot_examples=4)": 1e-3,
    }
    four_bit = {"qlora": 3e-3, "qlora(few_shot_examples=4)": 3e-3, "side": 1e-3, "side(few_shot_examples=4)": 1e-3}
    return [
        Run("gsm8k", method, rate, count, batch=8, seed=seed, test_rows=300)
        for seed, methods, count in product(SEEDS, (full, four_bit), GSM8K)
        for method, rate in methods.items()
    ]


STAGES = {"rates": rates, "seeds": seeds, "gsm8k": gsm8k}  # `seeds` needs the rows of `rates`


def _work(words: list[str]) -> str | None:
    """Run it; returns why it failed, if it did."""
    gc.collect()  # what ran before in this process takes no memory of this run, and of no other worker's
    torch.cuda.empty_cache()
    try:
        train.main(words)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None


def work(runs: list[Run], extra: list[str], workers: int, deadline: float, pool: ProcessPoolExecutor) -> list[int]:
    """Run what is not done, as many at a time as there are workers.

    Returns:
        How many failed, and how many are left for another time.
    """
    waiting = [run for run in runs if not run.is_done(extra, workers)]
    running: dict[Future[str | None], Run] = {}
    failed = 0
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < workers and time.monotonic() < deadline:
                run = waiting.pop(0)
                running[pool.submit(_work, [*run.words(), *extra])] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, message = running.pop(future), future.result()
                if message:
                    failed += 1
                    bar.write(f"{' '.join(run.words())}: {message}")
                bar.update()
    return [failed, len(waiting)]


def main() -> None:
    """Run stages, or list them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES, help="which runs, in that order")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the tasks' files are")
    parser.add_argument("--workers", type=positive, default=1, help="processes (1)")
    parser.add_argument("--minutes", type=float, nargs="+", help="start no run later: of each stage (no limit)")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "gsm8k"], help="only these")
    arguments = parser.parse_args()
    minutes = arguments.minutes or [math.inf] * len(arguments.stages)
    if len(minutes) != len(arguments.stages) or min(minutes) <= 0:
        parser.error(f"minutes are {minutes}; give a number above 0 for each stage.")

    def chosen(runs: list[Run]) -> list[Run]:
        return [run for run in runs if run.task in (arguments.tasks or [run.task])]

    extra = ["--data", str(arguments.data), "--workers", str(arguments.workers)]
    checkpoint()  # once, before the workers ask for it
    failed = left = 0
    threads = max(1, torch.get_num_threads() // arguments.workers)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, spawn, torch.set_num_threads, (threads,)) as pool:
        for stage, limit in zip(arguments.stages, minutes, strict=True):
            deadline = time.monotonic() + 60 * limit
            counts = work(chosen(STAGES[stage]()), extra, arguments.workers, deadline, pool)
            failed, left = failed + counts[0], left + counts[1]
    if left:
        print(f"{left} runs are left; run the same command again.")
    sys.exit(TIME_IS_UP if left else 1 if failed else 0)


if __name__ == "__main__":
    main()
