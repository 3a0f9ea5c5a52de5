"""The tables and plots of `docs/benchmarks.md`, made from the rows in `benchmarks/results`.

python -m benchmarks.page
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import grid, rows, targets
from benchmarks.common import HERE
from benchmarks.document import Lines, Tables, gib, main, markdown, newest, not_measured, plot, source
from benchmarks.methods import METHODS
from benchmarks.quality import page as quality
from benchmarks.rows import Row

DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
SUMMARY = ("side", "lora", "qlora", "qlora-checkpointed", "full")


def by_machine(found: list[Row]) -> list[list[Row]]:
    """The rows of each machine apart: they cannot be compared."""
    machines: dict[tuple[str, Any], list[Row]] = {}
    for row in found:
        machines.setdefault((row["environment"]["device"], row["environment"]["threads"]), []).append(row)
    return list(machines.values())


# -- training steps ------------------------------------------------------------------------------------------------


def step_rows(name: str) -> list[list[Row]]:
    """The grid's newest rows in its order, by machine; a method's options may have changed since."""
    place = {grid.what_of(json.loads(run.key())): index for index, run in enumerate(grid.GRIDS[name])}
    found = [row for row in rows.read("steps") if grid.what_of(row) in place]
    return [sorted(newest(mine, grid.what_of), key=lambda row: place[grid.what_of(row)]) for mine in by_machine(found)]


def step_line(row: Row, columns: int) -> list[str]:
    """One line of a table of steps."""
    start = [row["base"], row["method"], f"{row['batch']} x {row['length']}"]
    if row["out_of_memory"]:
        return [*start, "out of memory", *["-"] * (columns - 4)]
    time = row["step_seconds"]
    return [
        *start, gib(rows.peak(row)), *([gib(row["peak_reserved"])] if "peak_reserved" in row else []),
        gib(row["weight_bytes"]),
        f"{time['median']:.3f} ({time['quartile_1']:.3f} to {time['quartile_3']:.3f})",
        f"{row['step_over_forward']:.2f}", f"{row['tokens_per_second']:.0f}",
        f"{row['trained_parameters'] / 1e6:.2f}", f"{row['adapter_bytes'] / 2**20:.1f}",
    ]  # fmt: skip


def step_tables(images: Path, name: str, plotted: bool = False) -> str:
    """Tables of one grid, and a plot where sizes grow."""
    command = f"python -m benchmarks.grid {name}"
    start = ["base", "method", "batch", "peak memory, GiB"]
    rest = [
        "weights, GiB", "step, s (quartiles)", "step / base forward", "tokens/s", "trained, million", "adapter, MiB",
    ]  # fmt: skip
    parts = []
    for number, found in enumerate(step_rows(name)):
        # A CPU has no pool of memory beside what is allocated.
        header = [*start, *(["reserved, GiB"] if any("peak_reserved" in row for row in found) else []), *rest]
        parts += [markdown(header, [step_line(row, len(header)) for row in found]), source(found, command)]
        if plotted:
            file = images / f"{name}{f'-{number + 1}' if number else ''}.svg"
            lines: Lines = {}
            for row in found:
                if not row["out_of_memory"]:
                    label = f"{row['base']} {row['method']}"
                    lines.setdefault(label, []).append((row["batch"] * row["length"], rows.peak(row) / 2**30))
            parts.append(plot(file, lines, "tokens in a batch", "peak memory, GiB", logarithmic=True))
    return "\n\n".join(parts) or not_measured(command)


# -- the others ----------------------------------------------------------------------------------------------------


def summary_table(images: Path) -> str:
    """A side network beside LoRA and QLoRA: what it learns, and what a step costs."""
    steps = {row["method"]: row for found in step_rows("cpu")[:1] for row in found}
    if not steps:
        return not_measured("python -m benchmarks.grid cpu")
    losses = {
        (group[0]["method"], quality.base(group[0])): quality.spread(row["test"] for row in group)
        for group in quality.best(quality.runs(tested=True))
        if (group[0]["task"], group[0]["rows"], group[0].get("few_shot_examples", 0)) == ("gsm8k", 80, 0)
    }
    shown = [steps[name] for name in SUMMARY if name in steps]
    lines = [
        [
            f"`{row['method']}`", quality.base(row), losses.get((row["method"], quality.base(row)), "-"),
            gib(rows.peak(row)), f"{row['step_seconds']['median']:.1f}", f"{row['adapter_bytes'] / 2**20:.1f}",
        ]
        for row in shown
    ]  # fmt: skip
    header = ["method", "base", "GSM8K test loss", "peak memory, GiB", "step, s", "adapter, MiB"]
    return f"{markdown(header, lines)}\n\n{source(shown, 'python -m benchmarks.grid cpu')}"


def saved_table(images: Path) -> str:
    """Bytes saved for backward, a line for each method."""

    def shape(row: Row) -> str:
        supervised = row.get("supervised", 1.0)
        return row["base"] if supervised == 1 else f"{row['base']}, {supervised:.0%} supervised"

    command = "python -m benchmarks.saved_for_backward"
    found = newest(rows.read("saved_for_backward"), lambda row: (shape(row), row["method"]))
    if not found:
        return not_measured(command)
    bases = list(dict.fromkeys(shape(row) for row in found))
    names = [name for name in METHODS if any(row["method"] == name for row in found)]
    count = {(shape(row), row["method"]): f"{row['bytes_per_token'] / 1000:.1f}" for row in found}
    table = markdown(["method", *bases], [[name, *(count.get((base, name), "-") for base in bases)] for name in names])
    return f"Thousand bytes per token:\n\n{table}\n\n{source(found, command)}"


def curve_table(images: Path) -> str:
    """First, middle and last evaluation of each method in the last run, and a plot."""
    found = rows.read("curve")
    if not found:
        return not_measured("python -m benchmarks.curve")
    methods: dict[str, list[Row]] = {}
    for row in found:
        if row["date"] == found[-1]["date"]:
            methods.setdefault(row["method"], []).append(row)
    lines = []
    for name, mine in methods.items():
        for row in {row["step"]: row for row in (mine[0], mine[len(mine) // 2], mine[-1])}.values():
            rate, seconds, loss = f"{row['learning_rate']:g}", f"{row['seconds']:.0f}", f"{row['loss']:.4f}"
            lines.append([name, rate, row["step"], seconds, loss])
    table = markdown(["method", "learning rate", "steps", "training seconds", "test loss, nats per token"], lines)
    points = {name: [(row["seconds"], row["loss"]) for row in mine] for name, mine in methods.items()}
    image = plot(images / "curve.svg", points, "training seconds", "test loss, nats per token")
    return "\n\n".join([table, source([row for mine in methods.values() for row in mine], found[-1]["command"]), image])


def loss_table(images: Path) -> str:
    """Time and memory of a loss over a large vocabulary."""
    found = newest(rows.read("loss"), lambda row: (row["kind"], row["tokens"], str(row["environment"])))
    parts = []
    for mine in by_machine(found):
        lines = [[f"`{r['kind']}`", r["tokens"], f"{r['seconds']:.2f}", f"{r['peak_bytes'] / 2**20:.0f}"] for r in mine]
        parts += [markdown(["loss", "tokens", "seconds", "peak memory, MiB"], lines), source(mine, mine[-1]["command"])]
    return "\n\n".join(parts) or not_measured("python -m benchmarks.loss")


def generation_table(images: Path) -> str:
    """Speed of decoding."""
    found = newest(
        rows.read("generation"), lambda row: (row["base"], row["four_bit"], row["batch"], str(row["environment"]))
    )
    parts = []
    for mine in by_machine(found):
        names = list(mine[0]["tokens_per_second"])
        header = ["base", "weights", "batch", *(f"{name}, tokens/s (share of base)" for name in names)]
        lines = [
            [
                row["base"], "NF4" if row["four_bit"] else "full precision", row["batch"],
                *(f"{row['tokens_per_second'][name]:.1f} ({row['speed_of_base'][name]:.2f})" for name in names),
            ]
            for row in mine
        ]  # fmt: skip
        parts += [markdown(header, lines), source(mine, mine[-1]["command"])]
    return "\n\n".join(parts) or not_measured("python -m benchmarks.generation")


TABLES: Tables = {
    "summary": summary_table,
    "targets": lambda images: targets.table(),
    "saved-for-backward": saved_table,
    "loss": loss_table,
    "cpu": partial(step_tables, name="cpu"),
    "curve": curve_table,
    "generation": generation_table,
    "table1": partial(step_tables, name="table1"),
    "memory-table": partial(step_tables, name="memory-table"),
    "figure4": partial(step_tables, name="figure4", plotted=True),
    "long": partial(step_tables, name="long", plotted=True),
    "step-time": partial(step_tables, name="step-time"),
    "tiny": partial(step_tables, name="tiny"),
}


if __name__ == "__main__":
    main(DOCUMENT, TABLES, __doc__)
