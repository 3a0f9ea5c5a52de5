"""Recipes: YAML files with every setting of a run, installed with the package.

`names()` lists them, `path(name)` gives the file, `load(name)` its content; `qtuning recipes list | show | copy` does
the same from a shell. A recipe's name is its path without `.yaml`: the trainer that runs it, and what it is for.
"""

from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads the harness's `!function NAME` as the name."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def folder() -> Path:
    """Where the recipes are installed."""
    return Path(str(files(__name__)))


def names() -> list[str]:
    """Every recipe, such as `axolotl/llama-3-8b-24gb`."""
    return sorted(file.relative_to(folder()).with_suffix("").as_posix() for file in folder().rglob("*.yaml"))


def path(name: str) -> Path:
    """The file of the recipe `name`; a ValueError that names the others if there is none."""
    if name not in names():
        raise ValueError(f"There is no recipe {name!r}; choose one of {', '.join(names())}.")
    return folder() / f"{name}.yaml"


def load(name: str) -> dict[str, Any]:
    """The settings in the recipe `name`."""
    content: dict[str, Any] = yaml.load(path(name).read_text(encoding="utf-8"), _Loader)
    return content


def summary(name: str) -> str:
    """What the recipe `name` is for, as its first lines say."""
    first, *others = path(name).read_text(encoding="utf-8").splitlines()
    continued = takewhile(lambda line: line.startswith("#  "), others)
    return " ".join([first.removeprefix("# What:").strip(), *(line.lstrip("# ") for line in continued)])
