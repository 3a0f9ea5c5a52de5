"""The targets of `docs/benchmarks.md` and what was measured: a ratio for each kind of side network, met or missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks import rows
from benchmarks.document import markdown
from benchmarks.rows import Row, peak

OURS = ("side", "side-projection", "side-lean")
Values = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Target:
    """One line.

    Attributes:
        what: In words.
        limit: The target.
        values: The results, by method; nothing where there are no rows.
        at_least: Whether more is better.
    """

    what: str
    limit: float
    values: Callable[[], Values]
    at_least: bool = False

    def line(self) -> list[str]:
        """Of the table."""
        found = list(self.values())
        target = f"at {'least' if self.at_least else 'most'} {self.limit:g}"
        if not found:
            return [self.what, target, "not measured"]
        best = (max if self.at_least else min)(value for name, value in found if name in OURS)
        met = best >= self.limit if self.at_least else best <= self.limit
        result = ", ".join(f"{value:.0f} (`{n}`)" if value >= 100 else f"{value:.3g} (`{n}`)" for n, value in found)
        return [self.what, target, result if met else f"**missed**: {result}"]


def step_seconds(row: Row) -> float:
    """Median time of a step."""
    return float(row["step_seconds"]["median"])


def steps_of(base: str, batch: int, length: int) -> list[Row]:
    """Rows of this size that did not run out of memory, oldest first."""
    size = {"base": base, "batch": batch, "length": length, "supervised": 1.0, "out_of_memory": False}
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


def saved() -> Values:
    """Thousand bytes saved for backward per token."""
    found = {row["method"]: row for row in rows.read("saved_for_backward") if row["base"] == "llama-3-8b"}
    names = (*OURS, "lora-checkpointed")
    yield from ((name, found[name]["bytes_per_token"] / 1000) for name in names if name in found)


def decoding() -> Values:
    """Speed of generation over the base's own, one sequence."""
    found = [row for row in rows.read("generation") if row["batch"] == 1]
    if found:
        yield from ((name, found[-1]["speed_of_base"][name]) for name in ("side", "lora"))


GPU, CPU = ("llama-3-8b", 16, 512), ("smollm2-135m", 4, 256)
TARGETS = (
    Target("saved for backward, Llama-3-8B, 1000 bytes per token", 60, saved),
    Target("peak memory over QLoRA's, Llama-3-8B, 16 x 512", 0.25, against("qlora", peak, *GPU)),
    Target("the same, QLoRA with checkpointing", 0.70, against("qlora-checkpointed", peak, *GPU)),
    Target("the same, QLoRA with checkpoints on the host", 1, against("qlora-offloaded", peak, *GPU)),
    Target("step over QLoRA's, Llama-3-8B, 16 x 512", 0.50, against("qlora", step_seconds, *GPU)),
    Target("the same, QLoRA with checkpointing", 0.35, against("qlora-checkpointed", step_seconds, *GPU)),
    Target("the same, QLoRA with checkpoints on the host", 0.35, against("qlora-offloaded", step_seconds, *GPU)),
    Target("step over the base's own forward, Llama-3-8B, 16 x 512", 1.20, over_forward(*GPU)),
    Target("step over LoRA's, SmolLM2-135M on a CPU, 4 x 256", 0.40, against("lora", step_seconds, *CPU)),
    Target("step over checkpointed QLoRA's, the same", 0.35, against("qlora-checkpointed", step_seconds, *CPU)),
    Target("peak memory over QLoRA's, the same", 0.60, against("qlora", peak, *CPU)),
    Target("step over the base's own forward, the same", 1.20, over_forward(*CPU)),
    Target("generation over the base's speed, one sequence", 0.85, decoding, at_least=True),
)


def table() -> str:
    """All of it."""
    return markdown(["", "target", "result"], [target.line() for target in TARGETS])
