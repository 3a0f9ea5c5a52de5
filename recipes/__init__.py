"""Recipes: YAML files with every setting of a run, installed with the package.

`path(name)` gives the file, `load(name)` its content.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml


def path(name: str) -> Path:
    """Where the recipe `name` (without `.yaml`) is installed.

    Raises:
        ValueError: when there is no such recipe, naming those that exist.
    """
    folder = Path(str(files(__name__)))
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(
            f"There is no recipe {name!r}; choose one of {', '.join(sorted(f.stem for f in folder.glob('*.yaml')))}."
        )
    return file


def load(name: str) -> dict[str, Any]:
    """The settings in the recipe `name`."""
    content: dict[str, Any] = yaml.safe_load(path(name).read_text())
    return content
