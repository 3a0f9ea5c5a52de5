"""A grid of measurements, each in a process of its own, in random order. It resumes where it was interrupted.

    python -m benchmarks.grid table1 --minutes 9       nine minutes of it; run it again for the next nine
    python -m benchmarks.grid table1 --list            the runs, and which are done

A run is done when a row of this machine has the same base, method with its options, batch, length and loss. Where a
method ran out of memory, runs at least as large are skipped. Ends with status 75 if time is up and runs are left.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import methods, rows, step
from benchmarks.common import HERE, environment

TIME_IS_UP = 75  # "temporary failure, try again" of sysexits.h
ALL = tuple(name for name in methods.METHODS if name != "lora-checkpointed")
ON_CPU = (
    "side", "side-int8", "side-int4", "side-projection", "side-lean", "lora", "qlora", "qlora-checkpointed", "full",
)  # fmt: skip
LONG = (
    "side-lean", "side-projection", "side-int4", "side", "qlora-checkpointed", "qlora-lean", "qlora-offloaded",
)  # fmt: skip
WHAT = (
    "base",
    "method",
    "batch",
    "length",
    "supervised",
    "loss",
)  # identifies a measurement, with the method's options
FOUR_BIT = tuple(name for name in ALL if methods.METHODS[name].four_bit)


@dataclass(frozen=True)
class Run:
    """One call of `benchmarks.step`."""

    base: str
    method: str
    batch: int
    length: int
    steps: int = 10

    def arguments(self) -> list[str]:
        """Of the command."""
        named = {name: getattr(self, name) for name in ("base", "method", "batch", "length", "steps")}
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]

    def key(self) -> str:
        """What its row is found by."""
        return json.dumps(step.key(step.parser().parse_args(self.arguments())), sort_keys=True)

    def __str__(self) -> str:
        return f"{self.base} {self.method} {self.batch} x {self.length}"


def _runs(
    bases: tuple[str, ...], names: tuple[str, ...], batches: tuple[tuple[int, int], ...], steps: int = 10
) -> list[Run]:
    return [Run(base, name, *batch, steps) for base, name, batch in product(bases, names, batches)]


TABLE_1 = ("opt-1.3b", "opt-2.7b", "opt-6.7b", "llama-2-7b")
GRIDS = {
    "table1": _runs(TABLE_1, ALL, ((16, 512),)),
    "memory-table": _runs(("llama-2-7b", "llama-2-13b", "llama-2-70b"), ALL, ((4, 384),)),
    "figure4": _runs(
        ("llama-2-70b",),
        FOUR_BIT,
        ((4, 512), (8, 512), (16, 512), (24, 512), (4, 128), (4, 256), (4, 1024)),
    ),
    "long": _runs(("llama-3-8b", "qwen3-8b"), LONG, tuple((1, 1024 * k) for k in (8, 16, 32, 64, 128)), steps=5),
    "step-time": _runs(("llama-3-8b",), ALL, ((1, 8192), (16, 512))),
    "cpu": _runs(("smollm2-135m",), ON_CPU, ((4, 256),), steps=3),
    "tiny": _runs(("tiny",), ("side", "qlora"), ((2, 16), (2, 32)), steps=2),
}


def this_machine(row: dict[str, Any]) -> bool:
    """Whether a row was measured on a machine like this one, with as many threads."""
    here = environment()
    return all(row["environment"][name] == here[name] for name in ("device", "threads"))


def done() -> dict[str, dict[str, Any]]:
    """Rows of this machine by key, the newest of each."""
    return {key_of(row): row for row in rows.read("steps") if this_machine(row)}


def key_of(row: dict[str, Any]) -> str:
    """The key of the run that a row comes from."""
    return json.dumps({name: row[name] for name in (*WHAT, "options")}, sort_keys=True)


def what_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measured, whatever the method's options were."""
    return tuple(row[name] for name in WHAT)


def shuffled(runs: list[Run], seed: int) -> list[Run]:
    """In random order, but each method on each base from small to large, as sizes end where memory does."""
    order = random.Random(seed).sample(runs, len(runs))
    chains: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.batch * run.length, run.length)):
        chains.setdefault((run.base, run.method), []).append(run)
    return [chains[run.base, run.method].pop(0) for run in order]


def too_large(run: Run, found: dict[str, dict[str, Any]]) -> bool:
    """Whether less than `run` was out of memory already."""
    wanted = json.loads(run.key())
    sizes = ("batch", "length")
    return any(
        row["out_of_memory"] and all(row[n] <= v if n in sizes else row[n] == v for n, v in wanted.items())
        for row in found.values()
    )


def call(run: Run, device: str, timeout: float | None) -> str | None:
    """Run it; returns why it failed, if it did."""
    words = [sys.executable, "-m", "benchmarks.step", *run.arguments(), "--device", device]
    try:
        finished = subprocess.run(
            words, cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return "cut off, as the minutes are over; run the grid again"
    if finished.returncode == 0:
        return None
    if finished.returncode < 0:
        return f"killed by signal {-finished.returncode}, perhaps for the machine's memory"
    return (finished.stderr.strip().splitlines() or ["no message"])[-1]


def work(runs: list[Run], device: str, minutes: float | None, again: bool) -> tuple[int, int]:
    """Run what is not done.

    Returns:
        How many runs failed, and how many are left for another time.
    """
    started, longest, failed = time.monotonic(), 0.0, 0
    before = {} if again else done()
    waiting = [run for run in runs if run.key() not in before]
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar:
        for index, run in enumerate(waiting):
            bar.set_description(str(run))
            left = None if minutes is None else 60 * minutes - (time.monotonic() - started)
            if left is not None and left <= longest:
                return failed, len(waiting) - index
            if too_large(run, done()):
                bar.write(f"{run}: skipped, out of memory with less")
            else:
                begun = time.monotonic()
                message = call(run, device, left)
                longest = max(longest, time.monotonic() - begun)
                if message:
                    failed += 1
                    bar.write(f"{run}: {message}")
            bar.update()
    return failed, 0


def main() -> None:
    """Run a grid, or list it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=GRIDS, help="which runs")
    parser.add_argument("--list", action="store_true", help="show the runs and which are done, and run none")
    parser.add_argument("--minutes", type=float, help="start no run that would likely end later, and cut off what does")
    parser.add_argument("--again", action="store_true", help="measure anew what is done already")
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"minutes is {arguments.minutes}; give a number above 0.")

    runs = shuffled([run for run in GRIDS[arguments.grid] if methods.available(run.method)], arguments.seed)
    if arguments.list:
        found = done()
        for run in runs:
            row = found.get(run.key())
            state = "to run" if row is None else "out of memory" if row["out_of_memory"] else "done"
            print(f"{'too large' if row is None and too_large(run, found) else state:14}{run}")
        return
    failed, left = work(runs, arguments.device, arguments.minutes, arguments.again)
    if left:
        print(f"{left} runs are left; run the same command again.")
    sys.exit(TIME_IS_UP if left else 1 if failed else 0)


if __name__ == "__main__":
    main()
