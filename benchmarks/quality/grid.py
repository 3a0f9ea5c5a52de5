"""The tasks of the quality benchmark, side networks beside LoRA: many runs in several processes on one machine.

    python -m benchmarks.quality.grid rates seeds gsm8k --data FOLDER --workers 8 --minutes 2 1 1
    python -m benchmarks.quality.grid time --data FOLDER
    python -m benchmarks.quality.grid rates --data FOLDER --list

Stages, in the order given, each most important runs first: `rates` tries five learning rates of every method on every
task, one seed, validation rows alone; `seeds` runs the best of them with three seeds and test rows; `once` does both
for side networks that read their rows once; `gsm8k` compares 10, 40 and 160 steps, with few-shot examples and without;
`time` runs the best rates again, to be timed: with one worker, as runs beside each other slow each other down. Rows
are those of `benchmarks.quality.train`. It resumes: a run that has its row is not repeated. Ends with status 75 if time
is up and runs are left.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
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
from benchmarks.quality.learner import Learner
from benchmarks.quality.targets import ACCURACY
from benchmarks.step import positive

LORA, SIDE = ("lora", "qlora"), ("side(four_bit=False)", "side")
FULL, NF4 = (LORA[0], SIDE[0]), (LORA[1], SIDE[1])
RATES = ((1e-3, 2e-3, 5e-4), (4e-3, 2e-4))  # the middle ones first
SEEDS = (0, 1, 2)
# Test rows; epochs of a side network: from the hidden-state cache, which does not pay for long rows; rows in a step.
TASKS = {"sst2": (1800, 3, 32), "mrpc": (1700, 3, 32), "extraction": (300, 3, 32), "reward": (300, 1, 16),
         "cola": (500, 3, 32), "rte": (270, 3, 32)}  # fmt: skip
STEPS = (80, 320, 1280)  # rows of GSM8K, 8 in a step


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
        given = {f"--{name.replace('_', '-')}": getattr(self, name) for name in names}
        options = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        return [*options, "--seeds", str(self.seed), "--methods", f"{self.method}={self.rate:g}"]

    def __str__(self) -> str:
        return " ".join(self.words())

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
        if not found:
            return None
        best = max if self.task in ACCURACY else min
        return replace(self, rate=best(found, key=lambda row: row["validation"])["learning_rate"])


def _of(task: str, method: str) -> dict[str, int]:
    _, epochs, batch = TASKS[task]
    return {"epochs": epochs if method in SIDE else 1, "batch": batch}


def _best(runs: list[Run]) -> list[Run]:
    return [best for run in runs if (best := run.at_best_rate()) is not None]


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
    return _best([
        Run(task, method, None, **_of(task, method), seed=seed, test_rows=TASKS[task][0])
        for methods, task, seed in product((FULL, NF4), TASKS, SEEDS)
        for method in methods
    ])  # fmt: skip


def once_rates() -> list[Run]:
    """Side networks that read their rows once, where `rates` has several epochs."""
    tasks = [task for task, (_, epochs, _) in TASKS.items() if epochs > 1]
    return [Run(task, method, rate) for method, task, rate in product(SIDE, tasks, RATES[0])]


def once_seeds() -> list[Run]:
    """The best of them."""
    runs = dict.fromkeys(replace(run, rate=None, test_rows=TASKS[run.task][0]) for run in once_rates())
    return _best([replace(run, seed=seed) for run in runs for seed in SEEDS])


def gsm8k() -> list[Run]:
    """10, 40 and 160 steps, without few-shot examples and behind four; side networks also with three epochs."""
    found = []
    for count, methods, examples in product(STEPS, (FULL, NF4), (0, 4)):
        for method in methods:
            shown = _shown(method, examples)
            for rate, epochs in ((1e-3, 1), (1e-3, 3)) if method in SIDE else ((3e-3, 1), (1e-3, 1)):
                found.append(Run("gsm8k", shown, rate, count, epochs, 8, test_rows=300))
    return found


def gsm8k_seeds() -> list[Run]:
    """The best of them with two more seeds."""
    runs = list(dict.fromkeys(replace(run, rate=None) for run in gsm8k()))
    return _best([replace(run, seed=seed) for seed in SEEDS[1:] for run in runs])


def timed() -> list[Run]:
    """The best rates again, and 40 steps of GSM8K; one seed."""
    steps = dict.fromkeys(replace(run, rate=None, test_rows=None) for run in gsm8k() if run.rows == STEPS[1])
    full, four_bit = (
        [Run(task, method, None, **_of(task, method)) for task in TASKS for method in methods]
        for methods in (FULL, NF4)
    )
    return _best([*full, *steps, *four_bit])


def _shown(method: str, examples: int) -> str:
    """`method` behind so many few-shot examples."""
    name, _, given = method.rstrip(")").partition("(")
    options = [*filter(None, [given]), *[f"few_shot_examples={examples}"] * bool(examples)]
    return f"{name}({','.join(options)})" if options else name


# What comes later in a stage needs the rows of what comes before.
STAGES: dict[str, tuple[Callable[[], list[Run]], ...]] = {
    "rates": (rates,), "seeds": (seeds,), "gsm8k": (gsm8k, gsm8k_seeds), "once": (once_rates, once_seeds),
    "time": (timed,),
}  # fmt: skip


def _ready(workers: int) -> None:
    """Prepare a worker; one that is timed has loaded its kernels before."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if workers == 1 and torch.cuda.is_available():
        for method in (*FULL, *NF4):
            task = train.read("extraction", None, 0, 64)
            learner = Learner(train.parse(method).method, task, 1e-3, 2, 0)
            for batch in task.epochs(64, 32, 1, 0):
                learner.step(task.batch(batch))


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
                    bar.write(f"{run}: {message}")
                bar.update()
    return [failed, len(waiting)]


def main() -> None:
    """Run stages, or list them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES, help="which runs, in that order")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the tasks' files are")
    parser.add_argument("--workers", type=positive, default=1, help="processes (1)")
    parser.add_argument("--minutes", type=float, nargs="+", help="start no run later: of each stage (no limit)")
    parser.add_argument("--list", action="store_true", help="show the runs that are known now, and run none")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "gsm8k"], help="only these")
    arguments = parser.parse_args()
    minutes = arguments.minutes or [math.inf] * len(arguments.stages)
    if len(minutes) != len(arguments.stages) or min(minutes) <= 0:
        parser.error(f"minutes are {minutes}; give a number above 0 for each stage.")

    def chosen(runs: list[Run]) -> list[Run]:
        return [run for run in runs if run.task in (arguments.tasks or [run.task])]

    extra = ["--data", str(arguments.data), "--workers", str(arguments.workers)]
    if arguments.list:
        for run in [run for stage in arguments.stages for part in STAGES[stage] for run in chosen(part())]:
            print(f"{'done' if run.is_done(extra, arguments.workers) else 'to run':8}{run}")
        return
    checkpoint()  # once, before the workers ask for it
    spawn = multiprocessing.get_context("spawn")
    failed = left = 0
    with ProcessPoolExecutor(arguments.workers, spawn, _ready, (arguments.workers,)) as pool:
        for stage, limit in zip(arguments.stages, minutes, strict=True):
            deadline = time.monotonic() + 60 * limit
            for part in STAGES[stage]:
                counts = work(chosen(part()), extra, arguments.workers, deadline, pool)
                failed, left = failed + counts[0], left + counts[1]
    if left:
        print(f"{left} runs are left; run the same command again.")
    sys.exit(TIME_IS_UP if left else 1 if failed else 0)


if __name__ == "__main__":
    main()
