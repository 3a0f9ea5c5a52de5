"""Which score finds which kind of bad row? And how much of the noise quadrant is noise?

    python -m benchmarks.noise --data FOLDER

Rows of GSM8K, Dolly, Alpaca and WikiText-2 (the second half of a passage after its first) are corrupted in known ways,
20 % of them at a time, and once in four ways together; solutions of GSM8K come labelled right and wrong. For every
score: AUC, the chance that a bad row scores higher than a good one, in % (50 is chance). For every kind: the size of
the noise quadrant at a sample ratio of 1/2, and the share of bad rows in it, beside the same number of rows taken by
each single score. Scoring is resumable; `results/noise.jsonl` gets a row per kind, `docs/pruning.md` the tables.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks import rows
from benchmarks.common import HERE, read_data, smollm2
from benchmarks.gsm8k import read_rows
from qtuning_peft.eu_plane import EUPruner, score

CORRUPTED_SHARE = 0.2
SCORES = ("error", "uncertainty", "el2n", "ifd", "repetition", "noise", "supervised_tokens")


def corrupted(kind: str, answer: str, other: str, draw: random.Random) -> str:
    """`answer`, corrupted."""
    words = answer.split(" ")
    if kind == "other answer":
        return other
    if kind == "shuffled":
        return " ".join(draw.sample(words, len(words)))
    if kind == "typos":
        letters = "abcdefghijklmnopqrstuvwxyz"
        return "".join(draw.choice(letters) if c.isalpha() and draw.random() < 0.12 else c for c in answer)
    if kind == "cut":
        return " ".join(words[: max(1, round(0.4 * len(words)))])
    loop = words[: max(1, min(12, len(words) // 3))]
    return " ".join(loop * max(3, 2 * len(words) // len(loop)))


KINDS = ("other answer", "shuffled", "typos", "cut", "looped")
TOGETHER = ("other answer", "shuffled", "typos", "looped")
FOLDER_ROWS = 200


def auc(bad: np.ndarray, good: np.ndarray) -> float:
    """Chance that a bad row scores higher than a good one, ties half."""
    return float((np.greater.outer(bad, good) + 0.5 * np.equal.outer(bad, good)).mean())


def from_folder(data: Path) -> dict[str, list[dict[str, str]]]:
    """Good rows of the sets that are not copied into this repository."""
    alpaca = map(json.loads, (data / "alpaca_2k.jsonl").open(encoding="utf-8"))
    passages = (json.loads(line)["text"].split() for line in (data / "wikitext2_test.jsonl").open(encoding="utf-8"))
    halves = ((words[: len(words) // 2], words[len(words) // 2 :]) for words in passages if 60 <= len(words) <= 160)
    return {
        "Alpaca": [
            {"prompt": f"{row['instruction']}\n\n{row['input']}".strip(), "completion": row["output"]}
            for row in islice((row for row in alpaca if len(row["output"].split()) >= 5), FOLDER_ROWS)
        ],
        "WikiText-2": [
            {"prompt": " ".join(first), "completion": " ".join(second)} for first, second in islice(halves, FOLDER_ROWS)
        ],
    }


def corrupted_sets(data: Path) -> dict[str, tuple[list[dict[str, str]], list[dict[str, str]], dict[str, list[int]]]]:
    """For each source its good rows, its bad rows, and by kind which good rows the bad ones replace."""
    sources = {
        "GSM8K": [{"prompt": row["question"], "completion": row["answer"]} for row in read_rows("train", 250)],
        "Dolly": [
            {"prompt": f"{row['instruction']}\n\n{row['input']}".strip(), "completion": row["output"]}
            for row in read_data("dolly_200.jsonl")
        ],
        **from_folder(data),
    }
    sets = {}
    for name, good in sources.items():
        draw = random.Random(0)
        bad, replaced = [], {}
        for kind in KINDS:
            replaced[kind] = sorted(draw.sample(range(len(good)), round(CORRUPTED_SHARE * len(good))))
            for index in replaced[kind]:
                other = good[(index + draw.randrange(1, len(good))) % len(good)]["completion"]
                answer = corrupted(kind, good[index]["completion"], other, draw)
                bad.append({"prompt": good[index]["prompt"], "completion": answer})
        sets[name] = (good, bad, replaced)
    return sets


def rows_of_kind(source: str, kind: str, good: Dataset, bad: Dataset) -> dict[str, Any]:
    """One result row: AUC of every score, and precision of the noise quadrant and of every score at its size."""
    columns = {
        name: np.concatenate([np.asarray(bad[name], np.float64), np.asarray(good[name], np.float64)]) for name in SCORES
    }
    is_bad = np.arange(len(columns["error"])) < len(bad)
    noise = EUPruner(sample_ratio=0.5).fit(columns).quadrants(columns) == "noise"
    size = int(noise.sum())
    return {
        "source": source,
        "kind": kind,
        "good": len(good),
        "bad": len(bad),
        "auc": {name: auc(column[is_bad], column[~is_bad]) for name, column in columns.items()},
        "noise_size": size,
        "noise_precision": float(is_bad[noise].mean()),
        "precision": {
            name: float(is_bad[np.argsort(-column, kind="stable")[:size]].mean()) for name, column in columns.items()
        },
    }


def main() -> None:
    """Score, and write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of alpaca_2k and wikitext2_test")
    folder = parser.parse_args().data
    model, tokenizer = smollm2()

    def scored(data: list[dict[str, str]]) -> Dataset:
        options = {"resume_dir": HERE / "results" / "parts", "rows_per_part": 64}
        return score(Dataset.from_list(data), model, tokenizer, scores=("el2n", "ifd", "noise"), **options)

    results = []
    for source, (data, changed, replaced) in corrupted_sets(folder).items():
        good, bad = scored(data), scored(changed)
        start, together = 0, []
        for kind, indices in replaced.items():
            places = range(start, start := start + len(indices))
            together += places if kind in TOGETHER else []
            kept = good.select([i for i in range(len(good)) if i not in set(indices)])
            results.append(rows_of_kind(source, kind, kept, bad.select(places)))
        results.append(rows_of_kind(source, " or ".join(TOGETHER), good, bad.select(together)))
    solutions = read_data("gsm8k_solutions_320.jsonl")
    right, wrong = (
        scored([{"prompt": r["question"], "completion": r["solution"]} for r in solutions if r["is_correct"] is wanted])
        for wanted in (True, False)
    )
    results.append(rows_of_kind("GSM8K solutions", "wrong", right, wrong))

    origin = {"model": "SmolLM2-135M-Instruct, NF4"} | rows.provenance()
    rows.replace("noise", [row | origin for row in results])
    for row in results:
        print(f"{row['source']}, {row['kind']}: " + ", ".join(f"{n} {100 * v:.0f}" for n, v in row["auc"].items()))


if __name__ == "__main__":
    main()
