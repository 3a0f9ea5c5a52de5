"""The picture of the plane in the documents: GSM8K rows, a quarter of them spoilt, and half of all kept.

    python -m benchmarks.plane

96 rows, scored by SmolLM2-135M-Instruct in float32; 32 more whose answers belong to other questions, are shuffled,
have typos or loop, eight of each. Draws `docs/images/eu-plane.png`, where a cross marks a spoilt row, and prints how
many of them are in each quadrant. Scoring goes on where it was interrupted.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.common import HERE, smollm2
from benchmarks.document import markdown
from benchmarks.gsm8k import read_rows
from benchmarks.noise import TOGETHER, corrupted
from qtuning_peft import EUPruner, score
from qtuning_peft.eu_plane.plot import INK, plot_plane

GOOD, SPOILT, RATIO = 96, 32, 0.5
PICTURE = HERE.parent / "docs" / "images" / "eu-plane.png"


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
    """Score, draw, and print a table."""
    model, tokenizer = smollm2(quantized=False)
    options = {"resume_dir": HERE / "results" / "parts", "rows_per_part": 32}
    scored = score(Dataset.from_list(some_spoilt()), model, tokenizer, **options)
    pruner = EUPruner(sample_ratio=RATIO).fit(scored)
    title = "GSM8K under SmolLM2-135M, half of the rows kept (x: spoilt answers)"
    figure, spoilt = plot_plane(scored, pruner, title=title), np.array(scored["spoilt"][:]) != ""
    plane = next(axes for axes in figure.axes if axes.get_xlabel())
    x, y = (np.array(scored[name][:])[spoilt] for name in ("uncertainty", "error"))
    plane.scatter(x, y, s=14, marker="x", color=INK, linewidths=0.9)
    figure.savefig(PICTURE)
    quadrants = pruner.quadrants(scored)
    rows, spoilt_rows = Counter(quadrants.tolist()), Counter(quadrants[spoilt].tolist())
    kinds = {name: Counter(k for k, q in zip(scored["spoilt"], quadrants, strict=True) if q == name) for name in rows}
    lines = [[name, n, spoilt_rows[name], *(kinds[name][kind] for kind in TOGETHER)] for name, n in rows.items()]
    print(markdown(["quadrant", "rows", "spoilt", *TOGETHER], lines))


if __name__ == "__main__":
    main()
