"""What MkDocs does with a page besides Markdown: tables of options, and links that leave this folder.

`<!-- options: qtuning_peft.SideTuningConfig -->` becomes a table of that dataclass's fields, each with its default and
its help, followed by the choices of every field that has a registry; the path of a registry becomes a table of its
choices. Nothing is listed by hand, so that a choice which another file or package registers is in the documents when
they are built.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from importlib import import_module
from inspect import getdoc
from typing import Any

from griffe import Docstring, DocstringSectionKind
from peft import PeftConfig

from qtuning_peft.registry import Registry, load_extensions

OPTIONS = re.compile(r"^<!-- options: ([\w.]+)\.(\w+) -->$", re.MULTILINE)
OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(\s*\.\./([^)\s]*)\s*\)")
# Fields that nobody sets by hand.
INTERNAL = ("Filled in", "Must stay")

load_extensions()


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Fill in the tables of options; point links to other files of the repository there, or drop them."""

    def elsewhere(link: re.Match[str]) -> str:
        return f"[{link[1]}]({config.repo_url.rstrip('/')}/blob/main/{link[2]})" if config.repo_url else link[1]

    markdown = OUTSIDE.sub(elsewhere, markdown)
    return OPTIONS.sub(lambda mark: options(getattr(import_module(mark[1]), mark[2])), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take off what Hugging Face's docstrings mark names and types with, and Markdown does not know."""
    html = re.sub(r"\[(<code>[\w.]+</code>)\]", r"\1", html)
    return re.sub(r"<code>(`[^<]*)</code>", lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)


def options(of: Any) -> str:
    """Tables of the fields of a dataclass and of the choices of each that has a registry, or of one registry."""
    if isinstance(of, Registry):
        head = "| name | what it is |\n|---|---|"
        return "\n".join([head, *(f"| `{name}` | {_cell(of.help_of(name))} |" for name in of)])
    arguments = {
        argument.name: argument.description
        for section in Docstring(getdoc(of) or "").parse("google", warnings=False)
        if section.kind is DocstringSectionKind.parameters
        for argument in section.value
    }
    inherited = {field.name for field in fields(PeftConfig)}
    lines, choices = ["| option | default | meaning |", "|---|---|---|"], []
    for field in fields(of):
        text = field.metadata.get("help") or arguments.get(field.name, "")
        if not field.init or field.name.startswith("_") or field.name in inherited or text.startswith(INTERNAL):
            continue
        lines.append(f"| `{field.name}` | {_default(field)} | {_cell(text)} |")
        registry = field.metadata.get("choices")
        if isinstance(registry, Registry):
            choices += ["", f"Choices of `{field.name}`:", "", options(registry)]
    return "\n".join([*lines, *choices])


def _default(field: Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return "none" if value is None or value == () else "required" if value is MISSING else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
