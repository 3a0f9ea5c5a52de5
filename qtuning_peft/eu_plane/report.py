"""A report to judge a pruning by: one HTML file with the plane, its quadrants, and examples of what they hold.

The file needs nothing but itself: no network, no scripts. It follows the reader's choice of a light or a dark page.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import replacing
from ..loss import IGNORE_INDEX
from .plot import COLOURS, INK, plot_plane
from .pruner import EUPruner
from .selection import DEGENERATE, KEEP, TRIM, UNSCORED, Pruned
from .tokens import pieces_of

if TYPE_CHECKING:
    from datasets import Dataset

# Longer ones are cut in the report.
MOST_TOKENS, MOST_PROMPT = 400, 200
# Token errors from which on the colour is one step stronger, nats.
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
MEANING = {
    "noise": "high error, high uncertainty",
    "misconception": "high error, low uncertainty",
    "redundant": "low error, low uncertainty",
    "calibration": "low error, high uncertainty",
}
STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f8fa; --ink: #1f2328; --dim: #656d76; --line: #d8dee4;
  --heat: 147 51 234; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3; --dim: #8d96a0; --line: #30363d; --heat: 168 85 247; }
}
body { margin: 0 auto; max-width: 58rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; }
.dim, .scores { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; margin: 0; }
.tiles div, .sample { padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tiles dt { color: var(--dim); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.tiles small { display: block; font-size: .85rem; font-weight: 400; color: var(--dim); }
figure { margin: 1.5rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; max-width: 44rem; height: auto; margin: 0 auto; color: var(--ink); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--dim); font-weight: 500; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:first-child { white-space: nowrap; }
td:last-child { min-width: 9rem; }
td small { display: block; color: var(--dim); }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
.sample { margin: .75rem 0; }
.scores { font-size: .85rem; font-variant-numeric: tabular-nums; margin: 0 0 .4rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font-size: .92rem; line-height: 1.75; }
.t { border-radius: 3px; padding: .1em 0; }
.t:empty::after { content: "\\25e6"; color: var(--dim); }
.n::before { content: "\\21b5"; color: var(--dim); }
s.t { text-decoration: line-through 2px; }
.cut { color: var(--dim); font-style: italic; font-size: .85rem; border: 1px dashed var(--line); border-radius: 4px;
  padding: 0 .35em; white-space: nowrap; }
.key .t { padding: .15em .55em; margin-right: .2em; }
summary { cursor: pointer; color: var(--dim); margin: .5rem 0; }
""" + "".join(f".e{step} {{ background: rgb(var(--heat) / {0.09 * step:.2f}); }}\n" for step in range(1, 7))


def write_report(
    scored: Dataset,
    tokenizer: Any,
    pruner: EUPruner,
    path: str | os.PathLike[str],
    *,
    examples: int = 5,
    seed: int = 0,
) -> Path:
    """Write a report on `scored` to one HTML file.

    Args:
        scored: Data with the columns that `EUScorer` adds.
        tokenizer: The model's tokenizer, to show tokens as text.
        pruner: Fitted on this data.
        path: The file; one of that name is replaced once the report is whole.
        examples: Samples shown of every quadrant, spread over their errors.
        seed: Chooses among them.

    Returns:
        The path.

    Raises:
        ImportError: without matplotlib.
        ValueError: when an argument cannot be used.
    """
    if examples < 0:
        raise ValueError(f"examples is {examples}; choose at least 0.")
    found = pruner.pruned
    if found is None:
        raise ValueError("The pruner has found nothing yet; call fit(scored) first.")
    if found.samples != len(scored):
        raise ValueError(
            f"The pruner was fitted on {found.samples} rows, not on these {len(scored)}; pass the same data."
        )
    scored = scored.with_format(None)
    quadrants = pruner.quadrants(scored)
    sections = []
    for ordinal, name in enumerate(found.counts):
        rng = np.random.default_rng([seed, ordinal])
        members = np.flatnonzero(quadrants == name)
        chosen = spread(np.array(scored.select(members)["error"][:], np.float64), examples, rng) if len(members) else []
        cards = [_sample(scored[int(members[i])], int(members[i]), name, tokenizer, pruner) for i in chosen]
        sections.append(_section(name, cards, len(members)))
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Error-Uncertainty plane: {found.kept_samples:,} of {found.samples:,} samples kept</title>
<style>{STYLE}</style>
</head>
<body>
<h1>What is kept, and what is not</h1>
{_headline(found, pruner)}
<figure>{_picture(scored, pruner)}</figure>
{_table(scored, quadrants, found, pruner)}
<h2>Reading the examples</h2>
{_key(pruner)}
{"".join(sections)}
</body>
</html>
"""
    file = Path(path)
    with replacing(file) as unfinished:
        # A lone surrogate, which text in data may hold, has no UTF-8.
        unfinished.write_text(page, encoding="utf-8", errors="replace")
    return file


def spread(values: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """Indices of up to `count` of `values` (samples,), ascending: one at random of each of as many equal shares."""
    order = np.argsort(values, kind="stable")
    parts = np.array_split(order, min(count, len(order))) if count else []
    return [int(rng.choice(part)) for part in parts]


def _headline(found: Pruned, pruner: EUPruner) -> str:
    if pruner.sample_ratio is not None:
        budget = f"{percent(pruner.sample_ratio)} of the samples"
    else:
        budget = f"{pruner.num_samples or pruner.num_tokens:,} {'samples' if pruner.num_samples else 'tokens'}"
    details = f"strategy {pruner.strategy}"
    if pruner.token_ratio < 1:
        details += f"; {percent(pruner.token_ratio)} of the tokens where trimmed, by {pruner.token_strategy}"
    if pruner.stratum_column is not None:
        details += f"; in each stratum of {pruner.stratum_column}"
    correlation = f"{found.correlation:.2f}" if np.isfinite(found.correlation) else "undefined"
    tiles = "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{escape(more)}</small></dd></div>"
        for label, value, more in (
            ("Samples kept", f"{found.kept_samples:,}", of(found.kept_samples, found.samples)),
            ("Supervised tokens kept", f"{found.kept_tokens:,}", of(found.kept_tokens, found.tokens)),
            ("Budget", budget, details),
            ("Rank correlation", correlation, "of error and uncertainty (Spearman)"),
        )
    )
    notes = list(found.notes)
    if pruner.per_batch:
        notes.append("Thresholds are found anew in every batch (per_batch); this report divides all rows at once.")
    if pruner.keep_dropped:
        notes.append("Every row stays in the data (keep_dropped); its column quadrant says what would become of it.")
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<dl class="tiles">{tiles}</dl>' + (f"<ul>{listed}</ul>" if listed else "")


def _picture(scored: Dataset, pruner: EUPruner) -> str:
    """The plane as an `svg` element, in the colour of the page's text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Without a salt, names of elements would differ from one writing to the next.
    with rc_context({"svg.hashsalt": "plane", "svg.fonttype": "path"}):
        plot_plane(scored, pruner).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace(INK, "currentColor")
    return svg.replace("<svg", '<svg role="img" aria-label="Samples by error and uncertainty, coloured by quadrant"', 1)


def _table(scored: Dataset, quadrants: np.ndarray, found: Pruned, pruner: EUPruner) -> str:
    columns = [np.array(scored[name][:], np.float64) for name in ("error", "uncertainty", "supervised_tokens")]
    lines = []
    for name, count in found.counts.items():
        means = [values[quadrants == name].mean() if count else np.nan for values in columns]
        cells = [f"{count:,}", f"{count / found.samples:.1%}", *map(number, means, (3, 3, 1))]
        meaning = f"<small>{MEANING[name]}</small>" if name in MEANING else ""
        lines.append(
            f'<tr data-quadrant="{name}"><td>{dot(name)}{name}{meaning}</td>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{escape(fate(name, pruner))}</td></tr>"
        )
    heads = ("quadrant", "samples", "share", "mean error", "mean uncertainty", "mean tokens", "what becomes of them")
    return (
        f'<div class="table"><table><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        '<p class="dim">Errors and uncertainties are means over samples, in nats per supervised token.</p>'
    )


def _key(pruner: EUPruner) -> str:
    bounds = ["0", *(f"{step:g}" for step in STEPS)]
    scale = "".join(f'<span class="t e{i}">{bound}{"+" * (i == len(STEPS))}</span>' for i, bound in enumerate(bounds))
    struck = " Tokens struck through are trimmed: training does not learn them." if pruner.token_ratio < 1 else ""
    return (
        "<p>Dimmed text is the prompt, which is not supervised. The stronger a token's colour, the greater its error; "
        f"rest the pointer on it to read error and uncertainty.{struck}</p>"
        f'<p class="key">Token error in nats, from: {scale}</p>'
    )


def _section(name: str, cards: Sequence[str], count: int) -> str:
    visible, more = cards[:2], cards[2:]
    folded = f"<details><summary>{len(more)} more examples</summary>{''.join(more)}</details>" if more else ""
    about = f"{MEANING[name]}; " if name in MEANING else ""
    return (
        f'<section data-quadrant="{name}"><h2>{dot(name)}{name}</h2>'
        f'<p class="dim">{about}{count:,} {"sample" if count == 1 else "samples"}, {len(cards)} shown</p>'
        f"{''.join(visible)}{folded}</section>"
    )


def _sample(row: Mapping[str, Any], index: int, name: str, tokenizer: Any, pruner: EUPruner) -> str:
    """One example: its scores and its text."""
    facts = [f"row {index:,}"]
    if pruner.stratum_column is not None:
        facts.append(f"{pruner.stratum_column} {clipped(str(row[pruner.stratum_column]))}")
    if name == UNSCORED:
        text = f'<div class="text">{escape(clipped(str(row["unscored"])))}</div>'
    else:
        facts += [f"error {row['error']:.3f}", f"uncertainty {row['uncertainty']:.3f}"]
        facts += [f"repetition {row['repetition']:.2f}"] if row.get("repetition") is not None else []
        facts.append(f"{int(row['supervised_tokens']):,} supervised tokens")
        kept = pruner.kept_tokens(row) if name in TRIM and pruner.token_ratio < 1 else None
        facts += [f"{int(kept.sum()):,} kept"] if kept is not None else []
        text = f'<div class="text" dir="auto">{_tokens(row, kept, tokenizer)}</div>'
    head = f'<p class="scores">{escape(" · ".join(facts))}</p>'
    return f'<article class="sample" data-row="{index}">{head}{text}</article>'


def _tokens(row: Mapping[str, Any], kept: np.ndarray | None, tokenizer: Any) -> str:
    """The text of `row`: runs of other tokens dimmed, every supervised token coloured, those not `kept` struck."""
    labels = np.asarray(row["labels"], np.int64)
    supervised = labels != IGNORE_INDEX
    ids = np.where(supervised, labels, np.asarray(row["input_ids"], np.int64)).tolist()
    errors, uncertainties = row["token_error"], row["token_uncertainty"]
    if not len(errors) == len(uncertainties) == supervised.sum():
        raise ValueError(
            f"A row has {supervised.sum()} supervised tokens and {len(errors)} token scores; score the data again."
        )
    parts, seen, start = [], 0, 0
    for coloured, run in groupby(supervised.tolist()):
        stop = start + len(list(run))
        if not coloured:
            # A character may take several tokens, but no more than four.
            begin = max(start, stop - 4 * MOST_PROMPT)
            context = max(0, begin - 8)
            text = tokenizer.decode(ids[context:stop])[len(tokenizer.decode(ids[context:begin])) :]
            cut = begin > start or len(text) > MOST_PROMPT
            mark = '<span class="cut">prompt cut</span> ' if cut else ""
            parts.append(f'{mark}<span class="dim">{escape(text[-MOST_PROMPT:])}</span>')
        else:
            end, context = min(stop, start + MOST_TOKENS - seen), max(0, start - 8)
            for piece in pieces_of(tokenizer, ids[context:end])[start - context :]:
                tag = "span" if kept is None or kept[seen] else "s"
                level = int(np.searchsorted(STEPS, errors[seen], "right"))
                title = f"error {errors[seen]:.3f}, uncertainty {uncertainties[seen]:.3f} nats"
                shape = f"t e{level}{' n' if piece.startswith(chr(10)) else ''}"
                parts.append(f'<{tag} class="{shape}" title="{title}">{escape(piece)}</{tag}>')
                seen += 1
            if seen == MOST_TOKENS < len(errors):
                parts.append(f' <span class="cut">{len(errors) - seen:,} more supervised tokens</span>')
                break
        start = stop
    return "".join(parts)


def fate(name: str, pruner: EUPruner) -> str:
    """What becomes of the samples in the quadrant `name`."""
    if name in TRIM and pruner.token_ratio < 1:
        return f"kept, with {percent(pruner.token_ratio)} of their supervised tokens"
    if name in KEEP:
        return "kept whole"
    if name == DEGENERATE:
        return f"dropped: repetition above {pruner.max_repetition:g}"
    return "dropped: no score" if name == UNSCORED else "dropped"


def percent(ratio: float) -> str:
    """`ratio` in percent, without needless decimals."""
    return f"{100 * ratio:.4g}%"


def of(part: int, whole: int) -> str:
    """The whole, and the share of it that `part` is."""
    return f"of {whole:,}, {part / max(whole, 1):.1%}"


def number(value: float, digits: int) -> str:
    """`value` with so many decimals; a dash if there is none."""
    return f"{value:,.{digits}f}" if np.isfinite(value) else "–"  # noqa: RUF001


def dot(name: str) -> str:
    """A dot in the colour of the quadrant `name`."""
    return f'<span class="dot" style="background:{COLOURS[name]}"></span>'


def clipped(text: str, longest: int = 500) -> str:
    """`text`, or its beginning and how much is left out."""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"
