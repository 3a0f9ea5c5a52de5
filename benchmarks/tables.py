"""The tables and plots of `docs/benchmarks.md`, made from the rows in `benchmarks/results`.

    python -m benchmarks.tables

Between `<!-- NAME -->` and `<!-- end NAME -->` stands what this program wrote; all other text is left alone. Nothing
there is typed by hand, and what has no rows yet says so, with the command that measures it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import asked, grid, rows
from benchmarks.common import HERE, markdown
from benchmarks.rows import Row

DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
VERSIONS = ("python", "torch", "transformers", "peft", "bitsandbytes")


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.2f}"


def source(found: Iterable[Row], command: str) -> str:
    """Where rows come from, in one line."""
    found = list(found)
    machine = found[0]["environment"]
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    commits = sorted({f"{row['commit'] or 'unknown'}{' with changes' if row['dirty'] else ''}" for row in found})
    versions = [f"{name} {'/'.join(sorted({row['environment'][name] for row in found}))}" for name in VERSIONS]
    day = max(row["date"] for row in found)[:10]
    return f"(`{command}`; {machine['device']}{threads}; {', '.join(versions)}; commit {', '.join(commits)}; {day}.)"


def not_measured(command: str) -> str:
    """The sentence in place of a table."""
    return f"Not measured yet; `{command}` does it."


def by_machine(found: list[Row]) -> list[list[Row]]:
    """Rows of each machine apart: they cannot be compared."""
    machines: dict[tuple[str, Any], list[Row]] = {}
    for row in found:
        machines.setdefault((row["environment"]["device"], row["environment"]["threads"]), []).append(row)
    return list(machines.values())


def newest(found: list[Row], key: Callable[[Row], Any]) -> list[Row]:
    """The last row of each key."""
    return list({key(row): row for row in found}.values())


# -- training steps ------------------------------------------------------------------------------------------------


def step_rows(name: str) -> list[list[Row]]:
    """The grid's rows in its order, by machine."""
    place = {run.key(): index for index, run in enumerate(grid.GRIDS[name])}
    found = [row for row in rows.read("steps") if grid.key_of(row) in place]
    return [sorted(newest(mine, grid.key_of), key=lambda row: place[grid.key_of(row)]) for mine in by_machine(found)]


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


def step_tables(name: str, images: Path, plotted: bool = False) -> str:
    """Tables of one grid, and a plot where sizes grow."""
    command = f"python -m benchmarks.grid {name}"
    start = ["base", "method", "batch", "peak memory, GiB"]
    rest = [
        "weights, GiB",
        "step, s (quartiles)",
        "step / base forward",
        "tokens/s",
        "trained, million",
        "adapter, MiB",
    ]
    parts = []
    for number, found in enumerate(step_rows(name)):
        # A CPU has no pool of memory beside what is allocated.
        header = [*start, *(["reserved, GiB"] if any("peak_reserved" in row for row in found) else []), *rest]
        parts += [markdown(header, [step_line(row, len(header)) for row in found]), source(found, command)]
        if plotted:
            file = images / f"{name}{f'-{number + 1}' if number else ''}.svg"
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in found:
                if not row["out_of_memory"]:
                    label = f"{row['base']} {row['method']}"
                    lines.setdefault(label, []).append((row["batch"] * row["length"], rows.peak(row) / 2**30))
            parts.append(plot(file, lines, "tokens in a batch", "peak memory, GiB", logarithmic=True))
    return "\n\n".join(parts) or not_measured(command)


# -- the others ----------------------------------------------------------------------------------------------------


def held_table(images: Path) -> str:
    """Bytes held for backward, a line for each method."""
    command = "python -m benchmarks.held"
    found = newest(rows.read("held"), lambda row: (row["base"], row["method"]))
    if not found:
        return not_measured(command)
    bases, names = (list(dict.fromkeys(row[part] for row in found)) for part in ("base", "method"))
    count = {(row["base"], row["method"]): f"{row['bytes_per_token'] / 1000:.1f}" for row in found}
    table = markdown(["method", *bases], [[name, *(count.get((base, name), "-") for base in bases)] for name in names])
    return f"Thousand bytes per token:\n\n{table}\n\n{source(found, command)}"


def curve_table(images: Path) -> str:
    """First, middle and last evaluation of each method in the last run, and a plot."""
    command = "python -m benchmarks.curve"
    found = rows.read("curve")
    if not found:
        return not_measured(command)
    found = [row for row in found if row["date"] == found[-1]["date"]]
    lines = []
    for name in dict.fromkeys(row["method"] for row in found):
        mine = [row for row in found if row["method"] == name]
        for row in {r["step"]: r for r in (mine[0], mine[len(mine) // 2], mine[-1])}.values():
            lines.append(
                [name, f"{row['learning_rate']:g}", row["step"], f"{row['seconds']:.0f}", f"{row['loss']:.4f}"]
            )
    header = ["method", "learning rate", "steps", "training seconds", "held-out loss, nats per token"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in found:
        points.setdefault(row["method"], []).append((row["seconds"], row["loss"]))
    image = plot(images / "curve.svg", points, "training seconds", "held-out loss, nats per token")
    return "\n\n".join([markdown(header, lines), source(found, found[0]["command"]), image])


def loss_table(images: Path) -> str:
    """Time and memory of a loss over a large vocabulary."""
    command = "python -m benchmarks.loss"
    found = newest(rows.read("loss"), lambda row: (row["kind"], row["tokens"], str(row["environment"])))
    parts = []
    for mine in by_machine(found):
        lines = [[f"`{r['kind']}`", r["tokens"], f"{r['seconds']:.2f}", f"{r['peak_bytes'] / 2**20:.0f}"] for r in mine]
        parts += [markdown(["loss", "tokens", "seconds", "MiB at the peak"], lines), source(mine, mine[-1]["command"])]
    return "\n\n".join(parts) or not_measured(command)


def generation_table(images: Path) -> str:
    """Speed of decoding."""
    command = "python -m benchmarks.generation"
    found = newest(
        rows.read("generation"), lambda row: (row["base"], row["four_bit"], row["batch"], str(row["environment"]))
    )
    parts = []
    for mine in by_machine(found):
        lines = []
        for row in mine:
            names = list(row["tokens_per_second"])
            speeds = [f"{row['tokens_per_second'][n]:.1f} ({row['speed_of_base'][n]:.2f})" for n in names]
            lines.append([row["base"], "NF4" if row["four_bit"] else "full precision", row["batch"], *speeds])
        header = ["base", "weights", "batch", *(f"{n}, tokens/s (share of base)" for n in mine[0]["tokens_per_second"])]
        parts += [markdown(header, lines), source(mine, mine[-1]["command"])]
    return "\n\n".join(parts) or not_measured(command)


def plot(file: Path, lines: dict[str, list[tuple[float, float]]], x: str, y: str, logarithmic: bool = False) -> str:
    """Draw lines to `file`, the same bytes for the same rows; returns Markdown that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": file.stem, "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        if logarithmic:
            axes.set_xscale("log", base=2)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend()
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return f"![{y} against {x}](images/{file.name})"


TABLES: dict[str, Callable[[Path], str]] = {
    "table1": lambda images: step_tables("table1", images),
    "memory-table": lambda images: step_tables("memory-table", images),
    "figure4": lambda images: step_tables("figure4", images, plotted=True),
    "long": lambda images: step_tables("long", images, plotted=True),
    "step-time": lambda images: step_tables("step-time", images),
    "cpu": lambda images: step_tables("cpu", images),
    "tiny": lambda images: step_tables("tiny", images),
    "asked": lambda images: asked.table(),
    "held": held_table,
    "loss": loss_table,
    "curve": curve_table,
    "generation": generation_table,
}


def filled(text: str, images: Path, tables: dict[str, Callable[[Path], str]] = TABLES) -> str:
    """`text` with every one of `tables` in its place.

    Raises:
        ValueError: when a mark names no table, or has no end.
    """
    for name in re.findall(r"^<!-- (?!end )(\S+) -->$", text, re.MULTILINE):
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if name not in tables:
            raise ValueError(f"mark {name} names no table; use one of {', '.join(tables)}.")
        if end not in text:
            raise ValueError(f"mark {name} has no end; write {end} behind it.")
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{tables[name](images)}\n{end}{rest.split(end, 1)[1]}"
    return text


def main(
    document: Path = DOCUMENT,
    tables: dict[str, Callable[[Path], str]] = TABLES,
    description: str | None = __doc__,
) -> None:
    """Rewrite `document`, or what the command line names, with `tables`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, default=document, help="a Markdown file with marks")
    document = parser.parse_args().document
    try:
        text = filled(document.read_text(encoding="utf-8"), document.parent / "images", tables)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
