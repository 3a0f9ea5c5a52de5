"""A report to judge a pruning by: one HTML file with the plane, its quadrants, and examples of what they hold.

The file needs no network and no scripts. Its markup is `report.html.jinja`; here is what goes into it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..atomic import replacing
from ..loss import IGNORE_INDEX
from .plot import COLOURS, INK, plot_plane
from .pruner import EUPruner
from .selection import DEGENERATE, KEEP, TRIM, UNSCORED, Pruned
from .table import mismatch
from .tokens import pieces_of

if TYPE_CHECKING:
    from datasets import Dataset

# Longer ones are cut in the report.
MOST_TOKENS, MOST_PROMPT = 400, 200
# Token errors from which on the colour is one step stronger, nats.
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_ENVIRONMENT = Environment(loader=PackageLoader(__package__, ""), autoescape=True, keep_trailing_newline=True)
MEANING = {
    "noise": "high error, high uncertainty",
    "misconception": "high error, low uncertainty",
    "redundant": "low error, low uncertainty",
    "calibration": "low error, high uncertainty",
}


def write_report(
    scored: Dataset, tokenizer: Any, pruner: EUPruner, path: str | os.PathLike[str], *, examples: int = 5, seed: int = 0
) -> Path:
    """Write a report on `scored` to one HTML file; return its path.

    Args:
        scored: Data with the columns that `EUScorer` adds.
        tokenizer: The model's tokenizer, to show tokens as text.
        pruner: Fitted on this data.
        path: The file; one of that name is replaced once the report is whole.
        examples: Samples shown of every quadrant, spread over their errors.
        seed: Chooses among them.
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
    columns = [np.array(scored[name][:], np.float64) for name in ("error", "uncertainty", "supervised_tokens")]
    groups = []
    for ordinal, (name, count) in enumerate(found.counts.items()):
        members = np.flatnonzero(quadrants == name)
        means = [values[members].mean() if count else np.nan for values in columns]
        chosen = members[spread(columns[0][members], examples, np.random.default_rng([seed, ordinal]))].tolist()
        groups.append(
            {
                "name": name, "count": count, "fate": fate(name, pruner),
                "cells": [f"{count:,}", f"{count / found.samples:.1%}", *map(number, means, (3, 3, 1))],
                "cards": [_card(scored[index], index, name, tokenizer, pruner) for index in chosen],
            }
        )  # fmt: skip
    page = _ENVIRONMENT.get_template("report.html.jinja").render(
        found=found, tiles=_tiles(found, pruner), notes=_notes(found, pruner), picture=_picture(scored, pruner),
        groups=groups, meaning=MEANING, colours=COLOURS, steps=STEPS, trims=pruner.token_ratio < 1,
    )  # fmt: skip
    file = Path(path)
    with replacing(file) as unfinished:
        # A lone surrogate, which text in data may hold, has no UTF-8.
        unfinished.write_text(page, encoding="utf-8", errors="replace")
    return file


def spread(values: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """Indices of up to `count` of `values` (samples,), ascending: one at random of each of as many equal shares."""
    order = np.argsort(values, kind="stable")
    count = min(count, len(order))
    return [int(rng.choice(part)) for part in np.array_split(order, count)] if count else []


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


def number(value: float, digits: int) -> str:
    """`value` with so many decimals; a dash if there is none."""
    return f"{value:,.{digits}f}" if np.isfinite(value) else "–"  # noqa: RUF001


def clipped(text: str, longest: int = 500) -> str:
    """`text`, or its beginning and how much is left out."""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"


def _tiles(found: Pruned, pruner: EUPruner) -> list[tuple[str, str, str]]:
    """The figures at the top: what, how much, and more about it."""
    if pruner.sample_ratio is not None:
        budget = f"{percent(pruner.sample_ratio)} of the samples"
    else:
        budget = f"{pruner.num_samples or pruner.num_tokens:,} {'samples' if pruner.num_samples else 'tokens'}"
    details = f"strategy {pruner.strategy}"
    if pruner.token_ratio < 1:
        details += f"; {percent(pruner.token_ratio)} of the tokens where trimmed, by {pruner.token_strategy}"
    correlation = f"{found.correlation:.2f}" if np.isfinite(found.correlation) else "undefined"
    counts = [("Samples", found.kept_samples, found.samples), ("Supervised tokens", found.kept_tokens, found.tokens)]
    return [
        *((f"{what} kept", f"{part:,}", f"of {whole:,}, {part / max(whole, 1):.1%}") for what, part, whole in counts),
        ("Budget", budget, details), ("Rank correlation", correlation, "of error and uncertainty (Spearman)"),
    ]  # fmt: skip


def _notes(found: Pruned, pruner: EUPruner) -> list[str]:
    notes = list(found.notes)
    if pruner.per_batch:
        notes.append("Thresholds are found anew in every batch (per_batch); this report divides all rows at once.")
    if pruner.keep_dropped:
        notes.append("Every row stays in the data (keep_dropped); its column quadrant says what would become of it.")
    return notes


def _picture(scored: Dataset, pruner: EUPruner) -> Markup:
    """The plane as an `svg` element, in the colour of the page's text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Without a salt, names of elements would differ from one writing to the next.
    with rc_context({"svg.hashsalt": "plane", "svg.fonttype": "path"}):
        plot_plane(scored, pruner).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace(INK, "currentColor")
    label = 'role="img" aria-label="Samples by error and uncertainty, coloured by quadrant"'
    return Markup(svg.replace("<svg", f"<svg {label}", 1))


def _card(row: Mapping[str, Any], index: int, name: str, tokenizer: Any, pruner: EUPruner) -> dict[str, Any]:
    """One example: its scores and its text."""
    facts = [f"row {index:,}"]
    if name == UNSCORED:
        return {"row": index, "facts": facts, "parts": None, "reason": clipped(str(row["unscored"]))}
    facts += [f"error {row['error']:.3f}", f"uncertainty {row['uncertainty']:.3f}"]
    facts += [f"repetition {row['repetition']:.2f}"] if row.get("repetition") is not None else []
    facts.append(f"{int(row['supervised_tokens']):,} supervised tokens")
    kept = pruner.kept_tokens(row) if name in TRIM and pruner.token_ratio < 1 else None
    facts += [f"{int(kept.sum()):,} kept"] if kept is not None else []
    return {"row": index, "facts": facts, "parts": _parts(row, kept, tokenizer)}


def _parts(row: Mapping[str, Any], kept: np.ndarray | None, tokenizer: Any) -> list[dict[str, Any]]:
    """The text of `row`: runs of other tokens, and of supervised ones, those not `kept` (tokens,) trimmed."""
    labels = np.asarray(row["labels"], np.int64)
    supervised = labels != IGNORE_INDEX
    ids = np.where(supervised, labels, np.asarray(row["input_ids"], np.int64)).tolist()
    errors, uncertainties = row["token_error"], row["token_uncertainty"]
    if not len(errors) == len(uncertainties) == supervised.sum():
        raise mismatch(supervised.sum(), len(errors))
    parts: list[dict[str, Any]] = []
    seen, start = 0, 0
    for is_supervised, run in groupby(supervised.tolist()):
        stop = start + len(list(run))
        if not is_supervised:
            # A character may take several tokens, but no more than four.
            begin = max(start, stop - 4 * MOST_PROMPT)
            context = max(0, begin - 8)
            text = tokenizer.decode(ids[context:stop])[len(tokenizer.decode(ids[context:begin])) :]
            parts.append({"prompt": text[-MOST_PROMPT:], "cut": begin > start or len(text) > MOST_PROMPT})
        else:
            end, context = min(stop, start + MOST_TOKENS - seen), max(0, start - 8)
            texts = pieces_of(tokenizer, ids[context:end])[start - context :]
            tokens = [
                {
                    "text": text, "newline": text.startswith("\n"), "error": errors[i], "uncertainty": uncertainties[i],
                    "level": int(np.searchsorted(STEPS, errors[i], "right")),
                    "trimmed": kept is not None and not kept[i],
                }
                for i, text in enumerate(texts, start=seen)
            ]  # fmt: skip
            seen += len(texts)
            more = len(errors) - seen if seen == MOST_TOKENS else 0
            parts.append({"tokens": tokens, "more": more})
            if more:
                break
        start = stop
    return parts
