"""The targets of `docs/quality.md` and the results: a side network beside the best LoRA on a base of each precision.

The best of several runs is the one with the best validation result; what is compared are the test results.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import hypot, inf, sqrt
from statistics import mean

from benchmarks.document import markdown
from benchmarks.rows import Row

LORA = ("lora", "lora-r8", "qlora")
ACCURACY = ("sst2", "rte", "mrpc", "cola", "reward", "intent")  # tasks whose measure is accuracy: higher is better
SEEDS = 3  # fewer decide nothing about an accuracy
Seeds = list[Row]


def tested(seeds: Seeds) -> float:
    """Mean test result."""
    return mean(row["test"] for row in seeds)


def seconds(seeds: Seeds) -> float:
    """Mean time of training."""
    return mean(row["seconds"] for row in seeds)


def chosen(groups: list[Seeds]) -> Seeds:
    """The group with the best validation result, of groups of one task."""
    best = max if groups[0][0]["task"] in ACCURACY else min
    return best(groups, key=lambda seeds: mean(row["validation"] for row in seeds))


def name(seeds: Seeds) -> str:
    """How a run is written."""
    row = seeds[0]
    examples = f", {row['few_shot_examples']} examples" if row.get("few_shot_examples") else ""
    return f"{row['rows']} x {row['epochs']:g} rows{examples}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"


def pairs(groups: list[Seeds], task: str) -> Iterator[tuple[str, Seeds, list[Seeds]]]:
    """For each precision of the base: the best LoRA's first epoch, and all side networks."""
    for four_bit in (False, True):
        here = [seeds for seeds in groups if seeds[0]["task"] == task and seeds[0]["options"]["four_bit"] == four_bit]
        lora = [seeds for seeds in here if seeds[0]["method"] in LORA and seeds[0]["epochs"] == 1]
        sides = [seeds for seeds in here if seeds[0]["method"].startswith("side")]
        if lora and sides:
            yield "NF4" if four_bit else "float32", chosen(lora), sides


def of_losses(groups: list[Seeds]) -> Iterator[list[str]]:
    """GSM8K: at equal time, and from equal data."""
    for base, lora, sides in pairs(groups, "gsm8k"):
        # A little more time than LoRA's is within what a shared machine drifts.
        equal_time = [seeds for seeds in sides if seconds(seeds) <= 1.05 * seconds(lora)]
        equal_data = [seeds for seeds in sides if (seeds[0]["rows"], seeds[0]["epochs"]) == (lora[0]["rows"], 1)]
        for target, fitting, most_gap, most_share in (
            ("equal time: not above LoRA's", equal_time, 0.0, inf),
            ("equal data: within 0.05, in at most 0.4 of the time", equal_data, 0.05, 0.4),
        ):
            if fitting:
                best = chosen(fitting)
                gap, share = tested(best) - tested(lora), seconds(best) / seconds(lora)
                met = gap <= most_gap and share <= most_share
                yield [
                    f"GSM8K, {base}", target,
                    f"{tested(lora):.3f} in {seconds(lora):.0f} s, {name(lora)}",
                    f"{tested(best):.3f} in {seconds(best):.0f} s, {name(best)}",
                    f"{'met' if met else '**missed**'}: {gap:+.3f} in {share:.2f} of the time",
                ]  # fmt: skip


def of_accuracy(groups: list[Seeds]) -> Iterator[list[str]]:
    """Classes: from equal data, with the standard error that comes of so few rows."""
    for task in ACCURACY:
        for base, lora, sides in pairs(groups, task):
            best = chosen([seeds for seeds in sides if seeds[0]["rows"] == lora[0]["rows"]] or sides)
            gap = 100 * (tested(best) - tested(lora))
            # Seeds share their rows, and do not make it smaller.
            errors = [100 * sqrt(tested(some) * (1 - tested(some)) / some[0]["test_rows"]) for some in (lora, best)]
            verdict = "met" if gap >= -1 else "**missed**"
            if 100 * tested(lora) < 50 + 2 * errors[0]:
                verdict = "open, as LoRA learned nothing"
            if min(len(lora), len(best)) < SEEDS:
                verdict = f"open, as it takes {SEEDS} seeds"
            yield [
                f"{task}, {base}", "within 1 point, mean of three seeds",
                f"{tested(lora):.1%} in {seconds(lora):.0f} s, {name(lora)}",
                f"{tested(best):.1%} in {seconds(best):.0f} s, {name(best)}",
                f"{verdict}: {gap:+.1f} ± {hypot(*errors):.1f} points",
            ]  # fmt: skip


def of_memory(peaks: dict[str, float]) -> Iterator[list[str]]:
    """Peak of a step of 4 x 256, over LoRA's and QLoRA's; `peaks` is GiB by method."""
    for other, limit in (("lora", 0.5), ("qlora", 0.6)):
        if {"side", other} <= peaks.keys():
            share = peaks["side"] / peaks[other]
            yield [
                "peak memory of a step", f"at most {limit} of {other}'s", f"{peaks[other]:.2f} GiB",
                f"{peaks['side']:.2f} GiB", f"{'met' if share <= limit else '**missed**'}: {share:.2f}",
            ]  # fmt: skip


def table(groups: list[Seeds], peaks: dict[str, float]) -> str:
    """All of it."""
    lines = [*of_losses(groups), *of_accuracy(groups), *of_memory(peaks)]
    return markdown(["", "target", "best LoRA", "side network", "result"], lines)
