"""The tables of `docs/pruning.md`, made from the rows in `benchmarks/results`.

python -m benchmarks.pruning_page
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import rows
from benchmarks.common import HERE
from benchmarks.document import Tables, main, markdown, not_measured, source, spread
from benchmarks.page import by_machine

DOCUMENT = HERE.parent / "docs" / "pruning.md"
NAMES = {"supervised_tokens": "length"}
NOISE, SELECTION = "python -m benchmarks.noise --data data", "python -m benchmarks.quality.selection --data data"


def auc(_: Path) -> str:
    """Which score finds which kind of bad row."""
    found = rows.read("noise")
    if not found:
        return not_measured(NOISE)
    scores = list(found[0]["auc"])
    lines = [[row["source"], row["kind"], *(f"{100 * row['auc'][name]:.0f}" for name in scores)] for row in found]
    head = ["rows", "what is wrong", *(NAMES.get(name, name) for name in scores)]
    return f"{markdown(head, lines)}\n\n{source(found, NOISE)}"


def precision(_: Path) -> str:
    """How much of the noise quadrant is noise, beside as many rows with the highest scores."""
    found = rows.read("noise")
    if not found:
        return not_measured(NOISE)
    scores = list(found[0]["auc"])
    lines = [
        [
            row["source"], row["kind"], row["noise_size"], f"{100 * row['bad'] / (row['bad'] + row['good']):.0f}",
            f"{100 * row['noise_precision']:.0f}", *(f"{100 * row['precision'][name]:.0f}" for name in scores),
        ]
        for row in found
    ]  # fmt: skip
    head = ["rows", "what is wrong", "noise quadrant, rows", "bad overall", "noise quadrant"]
    return markdown([*head, *(NAMES.get(name, name) for name in scores)], lines)


def selection(_: Path) -> str:
    """What is learned from the rows that each strategy keeps: a table for each share of spoilt rows and budget."""
    found = rows.read("selection")
    if not found:
        return not_measured(SELECTION)
    parts = []
    for mine in by_machine(found):
        pairs = {(row["spoilt"], row["sample_ratio"]) for row in mine}
        parts += [_selection(mine, *pair) for pair in sorted(pairs, key=lambda pair: (-pair[1], pair[0]))]
        parts.append(source(mine, SELECTION))
    return "\n\n".join(parts)


def _selection(found: list[rows.Row], spoilt: float, samples: float) -> str:
    groups: dict[str, list[rows.Row]] = {}
    for row in found:
        if (row["spoilt"], row["sample_ratio"]) == (spoilt, samples):
            groups.setdefault(row["strategy"], []).append(row)
    counts, parts = ("samples", "kept_spoilt"), ("easy", "hard", "accuracy", "dolly_loss", "dolly_accuracy")
    lines: list[list[Any]] = [
        [
            name, len(runs), *(round(mean(run[part] for run in runs)) for part in counts),
            spread([run["loss"] for run in runs]), *(f"{mean(run[part] for run in runs):.3f}" for part in parts),
        ]
        for name, runs in sorted(groups.items(), key=lambda item: mean(run["loss"] for run in item[1]))
    ]  # fmt: skip
    base = found[0]["base"]
    lines.append(["the base", "-", "-", "-", f"{base['loss']:.3f}", *(f"{base[part]:.3f}" for part in parts)])
    head = ["strategy", "seeds", "samples", "of them spoilt", "loss", "easiest 80 %", "hardest 20 %", "accuracy",
            "Dolly, loss", "Dolly, accuracy"]  # fmt: skip
    return f"{spoilt:.0%} of the rows spoilt, budget {samples:.1%} of the samples:\n\n{markdown(head, lines)}"


TABLES: Tables = {"auc": auc, "precision": precision, "selection": selection}

if __name__ == "__main__":
    main(DOCUMENT, TABLES, __doc__)
