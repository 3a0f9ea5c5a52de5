"""The picture of the plane in the documents: GSM8K rows, a quarter of them spoilt, and what is kept of them.

    python -m benchmarks.plane

72 rows, and 24 more whose answers belong to other questions, are shuffled, have typos or loop, six of each, scored by
SmolLM2-135M-Instruct in float32. A quarter of all is kept, once by Algorithm 1 alone and once with the noisiest quarter
dropped first (`drop_noise`). Draws the second as `docs/images/eu-plane.png`, where a cross marks a spoilt row, and
prints how many of them are in each quadrant of both. Scoring goes on where it was interrupted.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.common import HERE, smollm2
from benchmarks.document import markdown
from benchmarks.gsm8k import read_rows
from benchmarks.noise import TOGETHER, corrupted
from qtuning_peft import EUPruner, score
from qtuning_peft.eu_plane.plot import INK, plot_plane

GOOD, SPOILT, RATIO = 72, 24, 0.25
PICTURE = HERE.parent / "docs" / "images" / "eu-plane.png"
TITLE = "GSM8K under SmolLM2-135M, a quarter of it spoilt (x)"


def some_spoilt() -> list[dict[str, Any]]:
    """Good rows, and spoilt ones behind them."""
    found = read_rows("train", GOOD + SPOILT)
    draw, made = random.Random(0), []
    for index, row in enumerate(found):
        answer, kind = row["answer"], ""
        if index >= GOOD:
            kind = TOGETHER[index % len(TOGETHER)]
            answer = corrupted(kind, answer, draw.choice(found[:index])["answer"], draw)
        made.append({"prompt": row["question"], "completion": answer, "spoilt": kind})
    return made


def main() -> None:
    """Score, draw, and print two tables."""
    model, tokenizer = smollm2(quantized=False)
    options = {"resume_dir": HERE / "results" / "parts", "rows_per_part": 32, "scores": ("noise",)}
    scored = score(Dataset.from_list(some_spoilt()), model, tokenizer, **options)
    kinds = np.array(scored["spoilt"][:])
    for share in (0.0, SPOILT / (GOOD + SPOILT)):
        pruner = EUPruner(sample_ratio=RATIO, drop_noise=share).fit(scored)
        quadrants = pruner.quadrants(scored)
        assert pruner.pruned is not None
        lines = [
            [name, count, *(int(((quadrants == name) & (kinds == kind)).sum()) for kind in TOGETHER)]
            for name, count in pruner.pruned.counts.items()
        ]
        print(f"drop_noise {share:g}", markdown(["quadrant", "rows", *TOGETHER], lines), sep="\n\n", end="\n\n")
    figure = plot_plane(scored, pruner, title=TITLE)
    plane = next(axes for axes in figure.axes if axes.get_xlabel())
    x, y = (np.array(scored[name][:])[kinds != ""] for name in ("uncertainty", "error"))
    plane.scatter(x, y, s=14, marker="x", color=INK, linewidths=0.9)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
