"""Tables and a plot of the runs of `benchmarks.quality.write_back_runs`: losses by steps, and what write-back gains.

Each method at its best learning rate on validation rows; what is shown is the loss on test rows.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from benchmarks import rows
from benchmarks.document import Lines, markdown, newest, not_measured, plot, source
from benchmarks.quality.targets import Seeds, tested

COMMAND = "python -m benchmarks.quality.write_back_runs --data data --variants NAME --steps STEPS --few-shot NUMBER"
NONE = "not measured"
SHOWN = {"LoRA": "lora", "side network": "read-only", "linear map alone": "linear"}
DRAWN = {
    "LoRA": ("lora", 0), "LoRA, 4 examples": ("lora", 4), "side network": ("read-only", 0),
    "side network, 4 examples": ("read-only", 4), "write-back, last-12": ("last-12", 0),
    "write-back, last-12+refit": ("last-12+refit", 0), "exact gradient, exact-12+slow": ("exact-12+slow", 0),
}  # fmt: skip
Runs = dict[tuple[str, int, int], Seeds]  # by variant, few-shot examples and steps: a row per seed, of one rate


def devices() -> list[Runs]:
    """The runs of each device, each at its best rate."""
    found: dict[str, dict[tuple[str, int, int], dict[float, Seeds]]] = {}
    good = [row for row in rows.read("write_back") if "error" not in row and not row["diverged"]]
    for row in newest(good, lambda row: (run_of(row), row["learning_rate"], row["seed"], device(row))):
        rates = found.setdefault(device(row), {}).setdefault(run_of(row), {})
        rates.setdefault(row["learning_rate"], []).append(row)
    return [
        {
            run: min(rates.values(), key=lambda seeds: mean(row["validation"] for row in seeds))
            for run, rates in of.items()
        }
        for of in found.values()
    ]


def device(row: rows.Row) -> str:
    """What a row was measured on."""
    return str(row["environment"]["device"])


def run_of(row: rows.Row) -> tuple[str, int, int]:
    """Variant, few-shot examples and steps."""
    return row["variant"], row["few_shot_examples"], row["steps"]


def loss(seeds: Seeds | None) -> str:
    """Mean test loss, and standard deviation where there are several seeds."""
    if seeds is None:
        return NONE
    return f"{tested(seeds):.4f}" + (f" ± {stdev(row['test'] for row in seeds):.4f}" if len(seeds) > 1 else "")


def origin(runs: Runs) -> str:
    """Where the rows come from."""
    return source([row for seeds in runs.values() for row in seeds], COMMAND)


def steps(images: Path) -> str:
    """Test losses after as many steps, without few-shot examples and behind them, and the plot."""
    parts = []
    for runs in devices():
        lines = []
        for count, examples in sorted({(count, examples) for _, examples, count in runs}):
            found = {label: runs.get((variant, examples, count)) for label, variant in SHOWN.items()}
            lora, side = found["LoRA"], found["side network"]
            gap = f"{tested(side) - tested(lora):+.3f}" if lora and side else "-"
            lines.append([count, examples or "-", *map(loss, found.values()), gap])
        header = ["steps", "few-shot examples", *SHOWN, "side network minus LoRA"]
        parts += [markdown(header, lines), origin(runs)]
    return "\n\n".join([*parts, drawn(images)]) if parts else not_measured(COMMAND)


def drawn(images: Path) -> str:
    """The plot of the device that measured most."""
    runs = max(devices(), key=len)
    lines: Lines = {}
    for label, (variant, examples) in DRAWN.items():
        points = [
            (float(count), tested(seeds))
            for (name, shown, count), seeds in runs.items()
            if (name, shown) == (variant, examples)
        ]
        if points:
            lines[label] = points
    return plot(images / "quality-steps.svg", lines, "steps of 8 rows", "GSM8K test loss, nats per token", True)


def write_back(images: Path) -> str:
    """Every variant: test losses, the gain over the side network that only reads, and what a step takes."""
    parts = []
    for runs in devices():
        counts = sorted({count for _, examples, count in runs if not examples})
        if not counts:
            continue
        lines = []
        for variant in sorted({name for name, _, _ in runs}, key=order):
            found = {count: runs.get((variant, 0, count)) for count in counts}
            some, base = found[counts[-1]], runs.get(("read-only", 0, counts[-1]))
            gain = f"{tested(base) - tested(some):+.3f}" if some and base else "-"
            timed = [
                row["step_over_forward"]
                for seeds in found.values()
                for row in seeds or []
                if "step_over_forward" in row
            ]
            lines.append([f"`{variant}`", *map(loss, found.values()), gain, f"{timed[-1]:.2f}" if timed else "-"])
        gained = f"gain over `read-only` at {counts[-1]}"
        header = ["variant", *[f"{count} steps" for count in counts], gained, "step / base's forward pass"]
        parts += [markdown(header, lines), origin(runs)]
    return "\n\n".join(parts) or not_measured(COMMAND)


def order(variant: str) -> tuple[int, str, int, str]:
    """LoRA, what only reads, and then by kind, number of blocks and changes."""
    kind, _, rest = variant.partition("-")
    number, _, changes = rest.partition("+")
    if variant in SHOWN.values():
        return list(SHOWN.values()).index(variant), "", 0, ""
    return len(SHOWN), kind, int(number), changes
