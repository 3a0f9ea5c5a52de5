"""The tables of `docs/models.md` that are made from rows.

python -m benchmarks.models_page
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from benchmarks import families, rows
from benchmarks.common import HERE
from benchmarks.document import Tables, main, markdown, newest, not_measured, source, spread
from benchmarks.quantizers import QUANTIZERS
from benchmarks.rows import Row

DOCUMENT = HERE.parent / "docs" / "models.md"
WHICH_BASE = "python -m benchmarks.quality.quantized_bases --data data --bases BASE"
COMMAND = "QUANTIZER_ROWS=1 bash scripts/test_quantizers.sh"


def quantizer_rows() -> list[Row]:
    """The newest row of each quantizer, in the order they are listed in."""
    found = {row["quantizer"]: row for row in newest(rows.read("quantizers"), lambda row: row["quantizer"])}
    return [found[name] for name in QUANTIZERS if name in found]


def mebibytes(row: Row) -> str:
    """The weights as loaded, and after the first pass, in which some quantizers unpack them."""
    return f"{row['bytes'] / 2**20:.0f}, {row['running_bytes'] / 2**20:.0f}"


def quantizers(_: Path) -> str:
    """What side tuning was run on, and what LoRA does on the same base."""
    found = [row for row in quantizer_rows() if "refused" not in row]
    if not found:
        return not_measured(COMMAND)
    lines = [
        [
            row["quantizer"], row["package"], f"`{row['layer']}`", mebibytes(row), "yes" if row["trains"] else "no",
            "works", row["lora"],
        ]
        for row in found
    ]  # fmt: skip
    header = ["base", "by", "linear layer", "MiB loaded, running", "its quantizer trains", "side tuning", "LoRA"]
    return f"{markdown(header, lines)}\n\n{source(found, COMMAND)}"


def refused_quantizers(_: Path) -> str:
    """What does not run without a GPU, in its own words."""
    found = [row for row in quantizer_rows() if "refused" in row]
    if not found:
        return not_measured(COMMAND)
    lines = [[row["quantizer"], row["package"], row["refused"]] for row in found]
    return markdown(["base", "by", "on a CPU"], lines)


def quantized_bases(_: Path) -> str:
    """What each quantization of the whole model loses, weighs and takes, and what a side network learns beside it."""
    found = newest(rows.read("quantized_bases"), lambda row: (row["base"], row["rows"], row["seed"]))
    if not found:
        return not_measured(WHICH_BASE)
    bases: dict[str, list[Row]] = {}
    for row in sorted(found, key=lambda row: row["base_loss"]["validation"]):
        bases.setdefault(row["base"], []).append(row)
    lines = [
        [
            name, mebibytes(runs[-1]), speed(runs),
            *(f"{runs[0]['base_loss'][part]:.3f}" for part in ("validation", "test")),
            *(spread([run["loss"][part] for run in runs]) for part in ("validation", "test")),
        ]
        for name, runs in bases.items()
    ]  # fmt: skip
    header = [
        "base", "MiB loaded, running", "forward's speed, of float32's", "base's loss, validation", "test",
        "trained, validation", "test",
    ]  # fmt: skip
    return f"{markdown(header, lines)}\n\n{source(found, WHICH_BASE)}"


def speed(runs: list[Row]) -> str:
    """Of a forward, over float32's; rows from a machine that others used have none."""
    found = [run["speed"] for run in runs if run["speed"] is not None]
    return f"{median(found):.2f}" if found else "-"


TABLES: Tables = {
    "families": lambda _: families.table(json.loads(families.RESULTS.read_text(encoding="utf-8"))),
    "quantizers": quantizers, "refused-quantizers": refused_quantizers, "quantized-bases": quantized_bases,
}  # fmt: skip

if __name__ == "__main__":
    main(DOCUMENT, TABLES, __doc__)
