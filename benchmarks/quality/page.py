"""The tables and plots of `docs/quality.md`, made from the rows in `benchmarks/results`.

    python -m benchmarks.quality.page

What a method learned against the time and the memory it took, and what every ablation was expected to do and did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev

from benchmarks import rows
from benchmarks.common import HERE, markdown
from benchmarks.quality import targets
from benchmarks.quality.ablations import ABLATIONS
from benchmarks.rows import Row
from benchmarks.tables import main, newest, not_measured, plot, source

DOCUMENT = HERE.parent / "docs" / "quality.md"
TRAIN, SEARCH = "python -m benchmarks.quality.train", "python -m benchmarks.quality.ablations"


def runs(reported: bool) -> list[list[Row]]:
    """Rows of one task, method, rate and number of rows: the seeds; those that were reported, or chosen from."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows.read("quality"):
        if (row["test"] is not None) == reported:
            names = ("task", "rows", "epochs", "method", "few_shot_examples", "options", "learning_rate")
            group = tuple(str(row.get(name, 0)) for name in names)
            groups.setdefault(group, []).append(row)
    return [newest(group, lambda row: row["seed"]) for _, group in sorted(groups.items(), key=lambda item: item[0][:3])]


def spread(values: Iterable[float]) -> str:
    """Mean, and standard deviation where there are several."""
    listed = list(values)
    return f"{mean(listed):.4f}" + (f" ± {stdev(listed):.4f}" if len(listed) > 1 else "")


def what(row: Row) -> list[object]:
    """The columns that say what was trained, and on what; see `WHAT`."""
    # Rows from before taps had centers do not have the option.
    given = row["options"]["arguments"]
    uncentered = row["method"].startswith("side") and not given.get("center_taps")
    method = row["method"] + (", no centers" if uncentered else "")
    base = "NF4" if row["options"]["four_bit"] else "float32"
    return [
        row["task"], f"{row['rows']} x {row['epochs']:g}", method, base, row.get("few_shot_examples") or "-",
        f"{row['learning_rate']:g}",
    ]  # fmt: skip


WHAT = ["task", "rows x epochs", "method", "base", "worked examples", "learning rate"]


def peaks() -> dict[str, float]:
    """GiB at the peak of a step on the CPU, by method."""
    found = [row for row in rows.read("steps") if row["base"] == "smollm2-135m" and not row["out_of_memory"]]
    return {row["method"]: rows.peak(row) / 2**30 for row in found}


def results(images: Path) -> str:
    """What was reported, and the two plots."""
    groups = runs(reported=True)
    if not groups:
        return not_measured(TRAIN)
    memory = peaks()
    lines = []
    by_time: dict[str, list[tuple[float, float]]] = {}
    by_memory: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        first = group[0]
        held = f"{memory[first['method']]:.2f}" if first["method"] in memory else "-"
        lines.append([
            *what(first), len(group),
            f"{first['trained_parameters'] / 1e6:.2f}", f"{mean(row['seconds'] for row in group):.0f}", held,
            spread(row["validation"] for row in group), spread(row["test"] for row in group),
        ])  # fmt: skip
        if first["task"] == "gsm8k":
            _, amount, method, base, examples, _ = what(first)
            label = f"{method}, {base}, {amount} rows" + (f", {examples} examples" if examples != "-" else "")
            by_time[label] = [
                (mean(p[2] for p in points), mean(p[3] for p in points))
                for points in zip(*(row["curve"] for row in group), strict=True)
            ]
            if first["method"] in memory:
                loss = mean(row["test"] for row in group)
                by_memory[label] = [(memory[first["method"]], loss)]
    header = [
        *WHAT, "seeds", "trained, million", "training, s", "peak of a step, GiB", "rows to choose by", "test",
    ]  # fmt: skip
    parts = [markdown(header, lines), source([row for group in groups for row in group], groups[-1][-1]["command"])]
    axis = "held-out loss, nats per token"
    parts.append(plot(images / "quality-time.svg", by_time, "training seconds", axis))
    if by_memory:
        parts.append(plot(images / "quality-memory.svg", by_memory, "peak memory of a step of 4 x 256, GiB", axis))
    return "\n\n".join(parts)


def rates(images: Path) -> str:
    """Learning rates that were tried; not their times, as other work may run beside such a search."""
    groups = runs(reported=False)
    if not groups:
        return not_measured(TRAIN)
    lines = [[*what(group[0]), spread(row["validation"] for row in group)] for group in groups]
    header = [*WHAT, "rows to choose by"]
    return "\n\n".join(
        [markdown(header, lines), source([row for group in groups for row in group], groups[-1][-1]["command"])]
    )


def search(images: Path) -> str:
    """Every ablation: expected, and found."""
    found = {row["name"]: row for row in rows.read("ablations")}
    if not found:
        return not_measured(SEARCH)
    lines = []
    for ablation in ABLATIONS:
        row = found.get(ablation.name)
        if row is None:
            lines.append([f"`{ablation.name}`", ablation.what, ablation.predicted, "-", "-", "-", "not run"])
            continue
        lines.append([
            f"`{ablation.name}`", ablation.what, ablation.predicted, row["steps"],
            f"{row['trained_parameters'] / 1e6:.2f}",
            f"{row['seconds']:.0f}", f"{row['loss_at_end']:.4f}",
        ])  # fmt: skip
    start = next(iter(found.values()))["loss_at_start"]
    header = ["ablation", "what", "expected", "steps", "trained, million", "seconds", "loss"]
    return "\n\n".join([
        f"Held-out nats per token; the base itself: {start:.4f}.",
        markdown(header, lines), source(found.values(), list(found.values())[-1]["command"]),
    ])  # fmt: skip


def asked(images: Path) -> str:
    """The targets."""
    groups = runs(reported=True)
    return targets.table(groups, peaks) if groups else not_measured(TRAIN)


TABLES: dict[str, Callable[[Path], str]] = {"asked": asked, "results": results, "rates": rates, "ablations": search}


if __name__ == "__main__":
    main(DOCUMENT, TABLES, __doc__)
