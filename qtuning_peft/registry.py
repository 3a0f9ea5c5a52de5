"""Choices by name that anyone can add to: one decorated function or class is one more.

A registry is what an option accepts. Configuration, YAML blocks, the command line, `--help` and the documents read it
when they are asked, so that a choice which another package adds is known to all of them. Packages are found by the
entry point group `qtuning_peft.extensions`, which names modules to import.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, field
from importlib.metadata import entry_points
from reprlib import repr as short
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """What the names that the option `field` takes mean, in order of registration."""

    def __init__(self, field: str) -> None:
        self.field = field
        self._choices: dict[str, T] = {}
        self._help: dict[str, str] = {}

    def add(self, name: str, choice: T, help: str | None = None) -> T:
        """Register `choice`; the first line of `help` describes it. A `ValueError` when the name is taken."""
        if name in self._choices:
            raise ValueError(f"{self.field} {name} is registered already; choose another name.")
        self._choices[name] = choice
        text = inspect.cleandoc(help or "").partition("\n")[0].rstrip(".")
        # Within a sentence, unless it begins with a name.
        word = text.partition(" ")[0]
        self._help[name] = text[:1].lower() + text[1:] if word[1:].islower() or word == "A" else text
        return choice

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: register a function or a class, described by its docstring."""
        return lambda choice: self.add(name, choice, choice.__doc__)

    def check(self, name: object) -> None:
        """Check that `name` is registered; else a `ValueError` that names the choices."""
        if not isinstance(name, str) or name not in self._choices:
            raise ValueError(f"{self.field} is {short(name)}; choose one of {', '.join(self)}.")

    def describe(self) -> str:
        """Every name with its description, for help texts."""
        return "; ".join(f"{name}: {text}" if text else name for name, text in self._help.items())

    def help_of(self, name: str) -> str:
        """Description of one choice."""
        return self._help[name]

    def __getitem__(self, name: str) -> T:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)


def help_of(field: Field[Any]) -> str:
    """The help of a dataclass field: `metadata["help"]`, and the choices where `metadata["choices"]` is a registry."""
    choices = field.metadata.get("choices")
    text: str = field.metadata["help"]
    return f"{text} {choices.describe()}." if isinstance(choices, Registry) else text


def option(default: Any, help: str, choices: Registry[Any] | None = None, least: int | None = None) -> Any:
    """A dataclass field with its help, and what it may be: one of `choices`, or an integer of at least `least`."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


def load_extensions() -> None:
    """Import what other installed packages register."""
    for entry_point in entry_points(group="qtuning_peft.extensions"):
        entry_point.load()
