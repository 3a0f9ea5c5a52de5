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


Setting = tuple[float, float, float]  # shares of spoilt rows, of the samples and of their tokens


def settings() -> dict[Setting, dict[str, list[rows.Row]]]:
    """Runs by strategy, the least loss first, of every setting."""
    found: dict[Setting, dict[str, list[rows.Row]]] = {}
    for row in rows.read("selection"):
        setting = row["spoilt"], row["sample_ratio"], row["token_ratio"]
        found.setdefault(setting, {}).setdefault(row["strategy"], []).append(row)

    def by_loss(item: tuple[str, list[rows.Row]]) -> float:
        return mean(run["loss"] for run in item[1])

    order = sorted(found, key=lambda setting: (setting[2], setting[0], setting[1]))
    return {setting: dict(sorted(found[setting].items(), key=by_loss)) for setting in order}


def selection(_: Path) -> str:
    """The loss of every strategy in every setting."""
    found = settings()
    if not found:
        return not_measured(SELECTION)
    names = dict.fromkeys(name for groups in found.values() for name in groups)
    head = [f"{100 * spoilt:.0f} %, {100 * samples:g} x {100 * tokens:g} %" for spoilt, samples, tokens in found]
    lines: list[list[Any]] = [
        [name, *(spread([run["loss"] for run in groups[name]]) if name in groups else "" for groups in found.values())]
        for name in names
    ]
    every = [row for groups in found.values() for runs in groups.values() for row in runs]
    lines.append(["the base", *[f"{every[0]['base']['loss']:.3f}"] * len(found)])
    return f"{markdown(['strategy', *head], lines)}\n\n{source(every, SELECTION)}"


def details(_: Path) -> str:
    """Everything that is measured: a table for each setting."""
    return "\n\n".join(_details(setting, groups) for setting, groups in settings().items()) or not_measured(SELECTION)


def _details(setting: Setting, groups: dict[str, list[rows.Row]]) -> str:
    counts = ("samples", "kept_spoilt")
    parts = ("easy", "hard", "accuracy", "dolly_loss", "dolly_accuracy", "choice_accuracy")
    lines: list[list[Any]] = [
        [
            name, len(runs), *(round(mean(run[part] for run in runs)) for part in counts),
            spread([run["loss"] for run in runs]), *(f"{mean(run[part] for run in runs):.3f}" for part in parts),
        ]
        for name, runs in groups.items()
    ]  # fmt: skip
    base = next(iter(groups.values()))[0]["base"]
    lines.append(["the base", "-", "-", "-", f"{base['loss']:.3f}", *(f"{base[part]:.3f}" for part in parts)])
    head = ["strategy", "seeds", "samples", "of them spoilt", "loss", "easiest 80 %", "hardest 20 %", "accuracy",
            "Dolly, loss", "Dolly, accuracy", "SST-2, accuracy"]  # fmt: skip
    spoilt, samples, tokens = setting
    title = f"{spoilt:.0%} of the rows spoilt, budget {samples:.1%} of the samples x {tokens:.0%} of their tokens:"
    return f"{title}\n\n{markdown(head, lines)}"


TABLES: Tables = {"auc": auc, "precision": precision, "selection": selection, "selection-details": details}

if __name__ == "__main__":
    main(DOCUMENT, TABLES, __doc__)
