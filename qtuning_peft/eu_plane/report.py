"""A report to judge a pruning by: one HTML file with the plane, its quadrants, and examples of what they hold.

The file needs no network and no scripts. Its markup is `report.html.jinja`; here is what goes into it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..atomic import replacing
from ..loss import IGNORE_INDEX
from .plot import BEFORE, COLOURS, INK, LABELS, PAPER, plot_plane
from .pruner import EUPruner
from .selection import KEEP, TRIM, UNSCORED
from .table import mismatch, numbers
from .tokens import pieces_of

if TYPE_CHECKING:
    from datasets import Dataset

# Longer ones are cut in the report.
MOST_TOKENS, MOST_PROMPT = 400, 200
SEEN_FOR_PREFIX = 1000
# Token errors from which on the colour is one step stronger, nats.
STEPS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_ENVIRONMENT = Environment(loader=PackageLoader("qtuning_peft", ""), autoescape=True, keep_trailing_newline=True)
MEANING = {
    "noise": "high error, high uncertainty",
    "misconception": "high error, low uncertainty",
    "redundant": "low error, low uncertainty",
    "calibration": "low error, high uncertainty",
    "topped_up": "of the dropped corners, as the kept ones are too small: error and uncertainty differ most",
    "middle": "in no corner",
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
    table = pd.DataFrame({name: numbers(scored, name) for name in ("error", "uncertainty", "supervised_tokens")})
    # A system prompt, or few-shot examples, say nothing of a row.
    seen = scored[:SEEN_FOR_PREFIX]["input_ids"]
    shared = sum(takewhile(bool, (first == last for first, last in zip(min(seen), max(seen), strict=False))))
    groups = []
    for ordinal, (name, count) in enumerate(found.counts.items()):
        members = table[quadrants == name]
        chosen = members.index[spread(members["error"], examples, np.random.default_rng([seed, ordinal]))].tolist()
        cards = [_card(scored[index], index, name, tokenizer, pruner, shared) for index in chosen]
        groups.append({"name": name, "count": count, "means": [*members.mean()], "cards": cards})
    page = _ENVIRONMENT.get_template("eu_plane/report.html.jinja").render(
        found=found, pruner=pruner, picture=_picture(scored, pruner), groups=groups, meaning=MEANING,
        colours=COLOURS, labels=LABELS, steps=STEPS, keep=KEEP, trim=TRIM if pruner.token_ratio < 1 else (),
    )  # fmt: skip
    file = Path(path)
    with replacing(file) as unfinished:
        # A lone surrogate, which text in data may hold, has no UTF-8.
        unfinished.write_text(page, encoding="utf-8", errors="replace")
    return file


def spread(values: Any, count: int, rng: np.random.Generator) -> list[int]:
    """Indices of up to `count` of `values` (samples,), ascending: one at random of each of as many equal shares."""
    order = np.argsort(values, kind="stable")
    count = min(count, len(order))
    return [int(rng.choice(part)) for part in np.array_split(order, count)] if count else []


def _picture(scored: Dataset, pruner: EUPruner) -> Markup:
    """The plane as an `svg` element, in the colour of the page's text."""
    figure, buffer = plot_plane(scored, pruner), io.StringIO()
    from matplotlib import rc_context  # plot_plane has said what to install, if it is not there

    # Without a salt, names of elements would differ from one writing to the next.
    with rc_context({"svg.hashsalt": "plane", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace(INK, "currentColor")
    svg = svg.replace(PAPER, "var(--page)").replace(BEFORE, "var(--line)")
    label = 'role="img" aria-label="Samples by error and uncertainty, coloured by quadrant"'
    return Markup(svg.replace("<svg", f"<svg {label}", 1))


def _card(
    row: Mapping[str, Any], index: int, name: str, tokenizer: Any, pruner: EUPruner, shared: int
) -> dict[str, Any]:
    """One example: its scores and its text, without the first `shared` tokens unless they are the whole prompt."""
    if name == UNSCORED:
        return {"index": index, "reason": row["unscored"]}
    kept = pruner.kept_tokens(row) if name in TRIM and pruner.token_ratio < 1 else None
    return {"index": index, "row": row, "kept": kept, "parts": _parts(row, kept, tokenizer, shared)}


def _parts(row: Mapping[str, Any], kept: np.ndarray | None, tokenizer: Any, shared: int) -> list[dict[str, Any]]:
    """The text of `row`: runs of other tokens, and of supervised ones, those not `kept` (tokens,) trimmed."""
    labels = np.asarray(row["labels"], np.int64)
    supervised = labels != IGNORE_INDEX
    ids = np.where(supervised, labels, np.asarray(row["input_ids"], np.int64)).tolist()
    errors, uncertainties = row["token_error"], row["token_uncertainty"]
    if not len(errors) == len(uncertainties) == supervised.sum():
        raise mismatch(supervised.sum(), len(errors))
    levels = np.searchsorted(STEPS, errors, "right").tolist()
    trimmed = ~kept if kept is not None else np.zeros(len(errors), bool)
    parts: list[dict[str, Any]] = []
    seen = start = 0
    for is_supervised, run in groupby(supervised.tolist()):
        stop = start + len(list(run))
        # A character may take several tokens, but no more than four.
        begin = start if is_supervised else max(start, stop - 4 * MOST_PROMPT, shared if shared < stop else 0)
        end = min(stop, start + MOST_TOKENS - seen) if is_supervised else stop
        texts = pieces_of(tokenizer, ids[max(0, begin - 8) : end])[min(8, begin) :]
        if is_supervised:
            tokens = zip(texts, *(of[seen:] for of in (errors, uncertainties, levels, trimmed)), strict=False)
            seen += len(texts)
            parts.append({"tokens": [*tokens], "more": len(errors) - seen if seen == MOST_TOKENS else 0})
            if seen == MOST_TOKENS:
                break
        else:
            text = "".join(texts)
            parts.append({"prompt": text[-MOST_PROMPT:], "cut": begin > start or len(text) > MOST_PROMPT})
        start = stop
    return parts
