"""What is asked of the package, and what the rows say of it: a ratio for each kind of side network, best or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks import rows
from benchmarks.common import markdown
from benchmarks.rows import Row, peak

OURS = ("side", "side-projection", "side-lean")
Values = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Asked:
    """One line.

    Attributes:
        what: In words.
        limit: What is asked.
        values: What rows say, by method; nothing where there are none.
        at_least: Whether more is better.
    """

    what: str
    limit: float
    values: Callable[[], Values]
    at_least: bool = False

    def line(self) -> list[str]:
        """Of the table."""
        found = list(self.values())
        asked = f"at {'least' if self.at_least else 'most'} {self.limit:g}"
        if not found:
            return [self.what, asked, "not measured"]
        best = (max if self.at_least else min)(value for name, value in found if name in OURS)
        met = best >= self.limit if self.at_least else best <= self.limit
        told = ", ".join(f"{value:.0f} (`{n}`)" if value >= 100 else f"{value:.3g} (`{n}`)" for n, value in found)
        return [self.what, asked, told if met else f"**missed**: {told}"]


def step_seconds(row: Row) -> float:
    """Of a step."""
    return float(row["step_seconds"]["median"])


def steps_of(base: str, batch: int, length: int) -> list[Row]:
    """Rows of this size that memory sufficed for, oldest first."""
    size = {"base": base, "batch": batch, "length": length, "out_of_memory": False}
    return [row for row in rows.read("steps") if all(row[name] == size[name] for name in size)]


def against(other: str, value: Callable[[Row], float], base: str, batch: int, length: int) -> Callable[[], Values]:
    """Our `value` over another method's, on the machine of its last row."""

    def values() -> Values:
        fitting = steps_of(base, batch, length)
        theirs = [row for row in fitting if row["method"] == other]
        if theirs:
            machine = theirs[-1]["environment"]["device"]
            mine = {row["method"]: row for row in fitting if row["environment"]["device"] == machine}
            yield from ((name, value(mine[name]) / value(theirs[-1])) for name in OURS if name in mine)

    return values


def over_forward(base: str, batch: int, length: int) -> Callable[[], Values]:
    """Our step over the base's own forward pass and loss."""

    def values() -> Values:
        mine = {row["method"]: row for row in steps_of(base, batch, length)}
        yield from ((name, mine[name]["step_over_forward"]) for name in OURS if name in mine)

    return values


def held() -> Values:
    """Thousand bytes held for backward per token."""
    found = {row["method"]: row["bytes_per_token"] / 1000 for row in rows.read("held") if row["base"] == "llama-3-8b"}
    yield from ((name, found[name]) for name in (*OURS, "lora-checkpointed") if name in found)


def decoding() -> Values:
    """Speed of generation over the base's own, one sequence."""
    found = [row for row in rows.read("generation") if row["batch"] == 1]
    if found:
        yield from ((name, found[-1]["speed_of_base"][name]) for name in ("side", "lora"))


SEVEN, CPU = ("llama-2-7b", 16, 512), ("smollm2-135m", 4, 256)
ASKED = (
    Asked("held for backward, Llama-3-8B, 1000 bytes a token", 60, held),
    Asked("peak memory over QLoRA's, Llama-2-7B, 16 x 512", 0.25, against("qlora", peak, *SEVEN)),
    Asked("the same, QLoRA with checkpointing", 0.70, against("qlora-checkpointed", peak, *SEVEN)),
    Asked("step over QLoRA's, Llama-2-7B, 16 x 512", 0.50, against("qlora", step_seconds, *SEVEN)),
    Asked("the same, QLoRA with checkpointing", 0.35, against("qlora-checkpointed", step_seconds, *SEVEN)),
    Asked("step over the base's own forward, Llama-3-8B, 1 x 8192", 1.20, over_forward("llama-3-8b", 1, 8192)),
    Asked("step over LoRA's, SmolLM2-135M on a CPU, 4 x 256", 0.40, against("lora", step_seconds, *CPU)),
    Asked("step over checkpointed QLoRA's, the same", 0.35, against("qlora-checkpointed", step_seconds, *CPU)),
    Asked("peak memory over QLoRA's, the same", 0.60, against("qlora", peak, *CPU)),
    Asked("step over the base's own forward, the same", 1.20, over_forward(*CPU)),
    Asked("generation over the base's speed, one sequence", 0.85, decoding, at_least=True),
)


def table() -> str:
    """All of it."""
    return markdown(["", "asked", "found"], [asked.line() for asked in ASKED])
