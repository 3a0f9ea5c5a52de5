"""The tables and plots of `docs/quality.md`, made from the rows in `benchmarks/results`.

    python -m benchmarks.quality.page

What each method learned, in what time and memory, and the results of the ablations.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from benchmarks import rows
from benchmarks.common import HERE
from benchmarks.document import Lines, Tables, main, markdown, newest, not_measured, plot, source
from benchmarks.methods import METHODS
from benchmarks.quality import few_shot, gains, targets, write_back_page
from benchmarks.quality.ablations import ABLATIONS
from benchmarks.quality.grid import TASKS
from benchmarks.quality.targets import ACCURACY, SEEDS, Seeds
from benchmarks.quality.train import BASE
from benchmarks.rows import Row

DOCUMENT = HERE.parent / "docs" / "quality.md"
GRID = "python -m benchmarks.quality.grid rates seeds --data data"
TRAIN, SEARCH = "python -m benchmarks.quality.train", "python -m benchmarks.quality.ablations"
WHAT = ["task", "rows x epochs", "method", "base", "few-shot examples", "learning rate"]
SECOND = "gemma-3-270m"  # of `benchmarks.gemma3`
PEAK = "peak memory of a step, GiB"


def runs(tested: bool, where: str = "cpu", model: str = BASE) -> list[Seeds]:
    """Rows of one task, method, rate and number of rows, a row per seed: those with a test result, or those without.

    Those of CPUs ("cpu"), of GPUs ("gpu"), and those of CPUs whose times say nothing: from states in a folder
    ("states"), or beside other processes ("shared"). Of the base called `model`.
    """
    groups: dict[tuple[str, ...], Seeds] = {}
    for row in rows.read("quality"):
        shared = "shared" if row.get("workers", 1) > 1 else "cpu"
        own = "states" if row.get("states") else "gpu" if row["environment"]["threads"] is None else shared
        if (row["test"] is not None) == tested and own == where and row["model"] == model:
            names = ("task", "rows", "epochs", "method", "few_shot_examples", "options", "learning_rate")
            group = (*(str(row.get(name, 0)) for name in names), row["environment"]["device"])
            groups.setdefault(group, []).append(row)
    return [newest(group, lambda row: row["seed"]) for _, group in sorted(groups.items(), key=lambda item: item[0][:3])]


def spread(values: Iterable[float]) -> str:
    """Mean, and standard deviation where there are several."""
    listed = list(values)
    return f"{mean(listed):.4f}" + (f" ± {stdev(listed):.4f}" if len(listed) > 1 else "")


def base(row: Row) -> str:
    """Precision of the base."""
    return "NF4" if row["options"]["four_bit"] else "float32"


def uncentered(row: Row) -> bool:
    """Whether a row of the default side network is from before taps had centers."""
    return row["method"] == "side" and not row["options"]["arguments"].get("center_taps")


def what(row: Row) -> list[object]:
    """The columns `WHAT`: what was trained, and on what."""
    return [
        row["task"], f"{row['rows']} x {row['epochs']:g}", row["method"] + ", no centers" * uncentered(row), base(row),
        row.get("few_shot_examples") or "-", f"{row['learning_rate']:g}",
    ]  # fmt: skip


def best(groups: list[Seeds]) -> list[Seeds]:
    """Of every method on a task and machine, with as many rows and examples: its best rate on the validation rows.

    A run without centers is left out where there is one with them.
    """
    rates: dict[tuple[object, ...], list[Seeds]] = {}
    for group in groups:
        task, amount, _, precision, examples, _ = what(group[0])
        machine = group[0]["environment"]["device"]
        rates.setdefault((task, amount, group[0]["method"], precision, examples, machine), []).append(group)
    result = []
    for found in rates.values():
        result.append(targets.chosen([group for group in found if not uncentered(group[0])] or found))
    return result


def peaks() -> dict[str, float]:
    """GiB at the peak of a step of 4 x 256 on the CPU, by method, each on the base of `benchmarks.methods`."""
    found = [row for row in rows.read("steps") if row["base"] == "smollm2-135m" and not row["out_of_memory"]]
    return {row["method"]: rows.peak(row) / 2**30 for row in found}


def peak(row: Row, memory: dict[str, float]) -> float | None:
    """The method's peak; none where it was measured with another base, task or prompt than this row's."""
    comparable = METHODS[row["method"]].four_bit == row["options"]["four_bit"] and row["task"] not in ACCURACY
    return memory.get(row["method"]) if comparable and not row.get("few_shot_examples") else None


def costs(group: Seeds, memory: dict[str, float]) -> list[str]:
    """Seconds of training, and the peak of a step."""
    gib = peak(group[0], memory)
    alone = group[0].get("workers", 1) == 1
    return [f"{targets.seconds(group):.0f}" if alone else "-", "-" if gib is None else f"{gib:.2f}"]


def origin(groups: list[Seeds]) -> str:
    """Where the rows come from."""
    return source([row for group in groups for row in group], groups[-1][-1]["command"])


def summary(images: Path) -> str:
    """Side networks beside LoRA and QLoRA, each at its best learning rate."""
    groups = [group for group in best(runs(tested=True)) if len(group) >= SEEDS]
    if not groups:
        return not_measured(TRAIN)
    memory = peaks()
    lines = [
        [*what(group[0]), *costs(group, memory), spread(row["test"] for row in group)]
        for group in sorted(groups, key=lambda group: (group[0]["task"], group[0]["method"].startswith("side")))
    ]
    return f"{markdown([*WHAT, 'training, s', PEAK, 'test'], lines)}\n\n{origin(groups)}"


def results(images: Path) -> str:
    """All rows with a test result, and the two plots."""
    groups = runs(tested=True)
    if not groups:
        return not_measured(TRAIN)
    memory = peaks()
    lines = [
        [
            *what(group[0]), len(group), f"{group[0]['trained_parameters'] / 1e6:.2f}", *costs(group, memory),
            spread(row["validation"] for row in group), spread(row["test"] for row in group),
        ]
        for group in groups + runs(tested=True, where="shared")
    ]  # fmt: skip
    header = [*WHAT, "seeds", "trained, million", "training, s", PEAK, "validation", "test"]
    return "\n\n".join([markdown(header, lines), origin(groups), *plots(images, groups, memory)])


def plots(images: Path, groups: list[Seeds], memory: dict[str, float]) -> list[str]:
    """GSM8K, each method at its best rate: validation loss against time, and test loss against memory."""
    by_time: Lines = {}
    by_memory: Lines = {}
    for group in best([group for group in groups if group[0]["task"] == "gsm8k"]):
        _, amount, method, precision, examples, _ = what(group[0])
        label = f"{method}, {precision}, {amount} rows" + (f", {examples} examples" if examples != "-" else "")
        curves = zip(*(row["curve"] for row in group), strict=True)  # points: step, tokens, seconds, validation loss
        by_time[label] = [(mean(point[2] for point in seeds), mean(point[3] for point in seeds)) for seeds in curves]
        gib = peak(group[0], memory)
        if gib is not None:
            by_memory[label] = [(gib, targets.tested(group))]
    time, space = images / "quality-time.svg", images / "quality-memory.svg"
    drawn = [plot(time, by_time, "training seconds", "GSM8K validation loss, nats per token")]
    if by_memory:
        drawn.append(plot(space, by_memory, "peak memory of a step of 4 x 256, GiB", "GSM8K test loss, nats per token"))
    return drawn


def rates(images: Path) -> str:
    """Learning rates that were tried; not their times, as other work may run beside such a search."""
    groups = [group for where in ("cpu", "shared", "states") for group in runs(tested=False, where=where)]
    groups = [group for group in groups if group[0]["validation_rows"] >= 32]  # others were run for their times
    if not groups:
        return not_measured(TRAIN)
    lines = [[*what(group[0]), spread(row["validation"] for row in group)] for group in groups]
    return f"{markdown([*WHAT, 'validation'], lines)}\n\n{origin(groups)}"


def ablations(images: Path) -> str:
    """Every ablation: what was expected, and the result."""
    found = {row["name"]: row for row in rows.read("ablations")}
    if not found:
        return not_measured(SEARCH)
    lines = []
    for ablation in ABLATIONS:
        row = found.get(ablation.name)
        result = ["-", "-", "-", "not run"] if row is None else [
            row["steps"], f"{row['trained_parameters'] / 1e6:.2f}", f"{row['seconds']:.0f}", f"{row['loss_at_end']:.4f}"
        ]  # fmt: skip
        lines.append([f"`{ablation.name}`", ablation.what, ablation.predicted, *result])
    start = next(iter(found.values()))["loss_at_start"]
    header = ["ablation", "what", "expected", "steps", "trained, million", "seconds", "validation loss"]
    command = list(found.values())[-1]["command"]
    return "\n\n".join([
        f"The base without training: {start:.4f} nats per token.", markdown(header, lines),
        source(found.values(), command),
    ])  # fmt: skip


def tasks(images: Path) -> str:
    """Test results of the tasks that LoRA and side networks were measured on, whatever the machine."""
    groups = [group for group in runs(tested=True, where="gpu") if not group[0].get("few_shot_examples")]
    groups += [group for group in runs(tested=True, where="shared") if group[0]["task"] in TASKS]
    groups = best(groups + runs(tested=True, where="states"))
    lines = [task_line(group) for group in groups] + stored_lines()
    both = [task for task in TASKS if {"lora", "side"} <= {line[2] for line in lines if line[0] == task}]
    if not both:
        return not_measured(GRID)
    shown = [line for task in both for line in sorted(lines, key=lambda line: str(line[2:5])) if line[0] == task]
    verdicts = [f"{line[0]}: {line[4]}" for line in targets.of_accuracy(groups)]
    met = [f"Within 1 point of LoRA, mean of three seeds: {'; '.join(verdicts)}."] * bool(verdicts)
    header = [*WHAT, "seeds", "validation", "test", "exact", "majority", "peak memory, GiB", "machine"]
    return "\n\n".join([markdown(header, shown), *met, origin(groups)])


def task_line(group: Seeds) -> list[object]:
    """A line of `tasks`."""
    exact = [row["exact"] for row in group if row.get("exact") is not None]
    majority, memory = group[0]["majority"], [row["peak_allocated"] for row in group if row["peak_allocated"]]
    return [
        *what(group[0]), len(group), spread(row["validation"] for row in group), spread(row["test"] for row in group),
        spread(exact) if exact else "-", "-" if majority is None else f"{majority:.4f}",
        f"{max(memory) / 2**30:.2f}" if memory else "-", group[0]["environment"]["device"],
    ]  # fmt: skip


def second_base(images: Path) -> str:
    """GSM8K with another base, each method at its best learning rate."""
    groups = best([group for where in ("cpu", "shared") for group in runs(tested=True, where=where, model=SECOND)])
    if not groups:
        return not_measured(f"{TRAIN} --base {SECOND}")
    lines = [
        [*what(group[0]), len(group), *(spread(row[part] for row in group) for part in ("validation", "test"))]
        for group in groups
    ]
    return f"{markdown([*WHAT, 'seeds', 'validation', 'test'], lines)}\n\n{origin(groups)}"


def stored_lines() -> list[list[object]]:
    """Lines of `tasks`, of `benchmarks.quality.stored_task`."""
    groups: dict[tuple[object, ...], Seeds] = {}
    for row in rows.read("stored_task"):
        amount = f"{row['rows']} x {row['epochs']}"
        groups.setdefault((row["task"], amount, f"{row['learning_rate']:g}"), []).append(row)
    return [
        [
            task, amount, "side", "float32", "-", rate, len(group),
            *(spread(row[part]["loss"] for row in group) for part in ("validation", "test")),
            spread(row["test"]["exact"] for row in group), "-", "-", group[0]["environment"]["device"],
        ]
        for (task, amount, rate), group in groups.items()
        if len(group) == max(len(other) for (own, *_), other in groups.items() if own == task)
    ]  # fmt: skip


def target_table(images: Path) -> str:
    """The targets."""
    groups = runs(tested=True)
    return targets.table(groups, peaks()) if groups else not_measured(TRAIN)


TABLES: Tables = {
    "summary": summary, "targets": target_table, "results": results, "rates": rates, "ablations": ablations,
    "tasks": tasks, "steps": write_back_page.steps, "write-back": write_back_page.write_back,
    "second-base": second_base, "gains": gains.table, "few-shot": few_shot.table,
}  # fmt: skip


if __name__ == "__main__":
    main(DOCUMENT, TABLES, __doc__)
