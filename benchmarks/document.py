"""Markdown pages whose tables and plots are made from result rows.

Between `<!-- NAME -->` and `<!-- end NAME -->` stands what a function returned; all other text is left alone. A table
without rows says so, with the command that measures it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.rows import Row

Tables = dict[str, Callable[[Path], str]]  # by name; each gets the folder of images, and returns Markdown
Lines = dict[str, list[tuple[float, float]]]  # points by label

VERSIONS = ("python", "torch", "transformers", "peft", "bitsandbytes")
# Okabe and Ito's colours, which color-blind readers can tell apart, and three more. With nine markers, colour and
# marker together repeat only after 90 lines.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255", "#8C6D31",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")


def markdown(header: list[str], lines: list[list[Any]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, ["---"] * len(header), *lines))


def gib(count: float) -> str:
    """Bytes as GiB."""
    return f"{count / 2**30:.2f}"


def source(found: Iterable[Row], command: str) -> str:
    """Where rows come from, in one line: command, machine, versions, commits and day."""
    found = list(found)
    machine = found[0]["environment"]
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    commits = sorted({f"{row['commit'] or 'unknown'}{' with changes' if row['dirty'] else ''}" for row in found})
    versions = [f"{name} {'/'.join(sorted({row['environment'][name] for row in found}))}" for name in VERSIONS]
    day = max(row["date"] for row in found)[:10]
    return f"(`{command}`; {machine['device']}{threads}; {', '.join(versions)}; commit {', '.join(commits)}; {day}.)"


def spread(values: list[float]) -> str:
    """Mean and standard deviation, of several runs."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def not_measured(command: str) -> str:
    """The sentence in place of a table."""
    return f"Not measured yet. Run `{command}`."


def newest(found: list[Row], key: Callable[[Row], Any]) -> list[Row]:
    """The last row of each key."""
    return list({key(row): row for row in found}.values())


def plot(file: Path, lines: Lines, x: str, y: str, logarithmic: bool = False) -> str:
    """Draw `lines` to `file`, the same bytes for the same points; returns Markdown that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": file.stem, "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        for number, (label, points) in enumerate(lines.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            axes.plot(*zip(*sorted(points), strict=True), markersize=6, label=label, **style)
        if logarithmic:
            axes.set_xscale("log", base=2)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        if lines:
            figure.legend(loc="outside right upper", frameon=False, labelspacing=0.8)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return f"![{y}, against {x}](images/{file.name})"


def filled(text: str, images: Path, tables: Tables) -> str:
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


def main(document: Path, tables: Tables, description: str | None) -> None:
    """Rewrite `document`, or the one that the command line names, with `tables`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, default=document, help="a Markdown file with marks")
    document = parser.parse_args().document
    try:
        text = filled(document.read_text(encoding="utf-8"), document.parent / "images", tables)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    document.write_text(text, encoding="utf-8")
