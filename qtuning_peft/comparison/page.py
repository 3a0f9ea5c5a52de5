"""Answers and verdicts as one HTML file, without scripts and without anything from elsewhere."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..atomic import replacing
from .answers import BASE, TUNED, Answers
from .judge import TIE, UNREADABLE, count

_ENVIRONMENT = Environment(loader=PackageLoader("qtuning_peft", ""), autoescape=True, keep_trailing_newline=True)
# Of the tuned model, in the order of the page.
OUTCOMES = {TUNED: "wins", TIE: "ties", BASE: "losses", UNREADABLE: "unreadable"}


def write_page(answers: Answers, path: Path, judge: str | None = None) -> None:
    """Write a page of all answered questions, with the verdicts of `judge`, by default the last that judged them."""
    rows = [row for row in answers.rows if TUNED in row]
    names = [name for row in rows for name in row.get("verdicts", {})]
    judge = judge or (names[-1] if names else None)
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(str(row.get("category", "")), []).append(row)
    page = _ENVIRONMENT.get_template("comparison/page.html.jinja").render(
        rows=rows, settings=answers.settings, judge=judge, outcomes=OUTCOMES, counts=count(rows, judge or ""),
        groups={name: (len(members), count(members, judge or "")) for name, members in groups.items()},
    )  # fmt: skip
    with replacing(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8", errors="replace")
