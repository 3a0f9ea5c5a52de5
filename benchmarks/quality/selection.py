"""Which rows, and which of their tokens, to train on: strategies at equal tokens and steps, on clean and spoilt rows.

    python -m benchmarks.quality.selection --data FOLDER             resumes where it was interrupted

SmolLM2-135M-Instruct in float32 and a side network of the default settings, which learns from 320 rows of GSM8K, some
of them spoilt (answers of other questions, shuffled, with typos, looped). The base runs once over all rows; everything
else is read from its states. Every strategy keeps as many supervised tokens as the plane's share of the samples times
`token_ratio`, and takes 20 steps: equal tokens through the head in equal steps are equal time. Measured as Q-Tuning
does, on what was not trained on as well: loss and accuracy of the next token on GSM8K test rows and on Dolly rows, and
the accuracy of two choices, by their likelihood, on SST-2; the loss of GSM8K also on the 80 % of tokens that are
easiest to the base and on the hardest 20 %. Rows go to `results/selection.jsonl`.
"""

from __future__ import annotations

import argparse
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import rows
from benchmarks.common import DEVICE
from benchmarks.quality.from_states import RATE, Batches, Rows, fresh, learn, vocabulary_of
from benchmarks.quality.selection_data import Data
from benchmarks.step import positive
from qtuning_peft import EUPruner
from qtuning_peft.eu_plane.selection import KEEP, TRIM, Options, sample_strategy

NAME, TRAIN_ROWS, STEPS = "selection", 320, 20
PLANE = "plane x tokens (Q-Tuning)"  # with the run's token_ratio; its tokens are everybody's budget
STRATEGIES: dict[str, dict[str, Any]] = {
    PLANE: {},
    "plane x tokens, highest stay": {"token_strategy": "reversed"},
    "plane, whole rows": {"token_ratio": 1.0},
    "random": {"strategy": "random"},
    "random, twice the rows, half their tokens": {
        "strategy": "random", "token_ratio": 0.5, "token_strategy": "random"
    },
    "highest entropy": {"strategy": "entropy"},
    "highest error": {"strategy": "highest_perplexity"},
    "lowest error": {"strategy": "lowest_perplexity"},
    "few-shot gain": {"strategy": "few_shot_gain"},
    "ifd": {"strategy": "ifd"},
    "shortest (removes the longest)": {"strategy": "shortest"},
    "longest": {"strategy": "longest"},
    "random, noisiest dropped": {"strategy": "random", "drop_noise": 0.0},
    "plane, whole rows, noisiest dropped": {"token_ratio": 1.0, "drop_noise": 0.0},
}  # fmt: skip


@sample_strategy("few_shot_gain", "few_shot_gain")
def few_shot_gain(scored: pd.DataFrame, options: Options) -> Any:
    """Highest difference of the errors without few-shot examples and with them."""
    return scored["few_shot_gain"]


def batches_of(found: Rows, chosen: dict[int, Tensor], seed: int) -> Batches:
    """The tokens `chosen` (bool) of each row, in `STEPS` batches of about as many tokens."""
    order, batches = random.Random(seed).sample(sorted(chosen), len(chosen)), []
    for step in range(STEPS):
        places = order[step::STEPS] or [order[step % len(order)]]  # fewer rows than steps
        parts = [(*found.rows[index], chosen[index]) for index in places]
        states = torch.cat([states[:, kept] for states, _, kept in parts], dim=1)
        labels = torch.cat([torch.tensor([-100], device=DEVICE), *(labels[kept] for _, labels, kept in parts)])
        batches.append({"states": states, "labels": labels, "state_layers": found.layers})
    return batches, STEPS


def choose(scored: Any, options: dict[str, Any], seed: int) -> dict[int, Tensor]:
    """By row that is kept, which of its supervised tokens are, (tokens,), bool."""
    pruner = EUPruner(**options, seed=seed).fit(scored)
    kept = {}
    for index, quadrant in enumerate(pruner.quadrants(scored)):
        if quadrant in KEEP:
            trimmed = quadrant in TRIM and pruner.token_ratio < 1
            whole = np.ones(scored[index]["supervised_tokens"], bool)
            kept[index] = torch.from_numpy(pruner.kept_tokens(scored[index]) if trimmed else whole).to(DEVICE)
    return kept


def main() -> None:
    """One row for each share of spoilt rows, budget, strategy and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of GSM8K's, Dolly's, SST-2's files")
    parser.add_argument("--spoilt", type=float, nargs="+", default=[0.0, 0.2, 0.4], help="shares (0 0.2 0.4)")
    parser.add_argument("--samples", type=float, nargs="+", default=[0.25], help="the plane's sample_ratio (0.25)")
    parser.add_argument("--tokens", type=float, nargs="+", default=[0.5], help="the plane's token_ratio (0.5)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[*STRATEGIES], metavar="STRATEGY")
    parser.add_argument("--rows", type=positive, default=TRAIN_ROWS, help=f"training rows ({TRAIN_ROWS})")
    parser.add_argument("--test-rows", type=positive, default=60, help="test rows of each text (60)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and weights (0 1 2)")
    arguments = parser.parse_args()
    count = arguments.rows
    data = Data(arguments.data, count, arguments.test_rows, round(max(arguments.spoilt) * count))
    done = {tuple(row["run"]) for row in rows.read(NAME)}
    for share, samples, tokens in product(arguments.spoilt, arguments.samples, arguments.tokens):
        bad = round(share * count)
        train, scored = data.with_spoilt(bad)
        plane = EUPruner(sample_ratio=samples, token_ratio=tokens).fit(scored).pruned
        assert plane is not None
        vocabulary = vocabulary_of(fresh(data.folder, 0), train)
        progress = f"{share:.0%} spoilt, {samples:.1%} x {tokens:.0%}"
        for seed, name in tqdm([*product(arguments.seeds, arguments.strategies)], progress, unit="run"):
            run = (share, samples, tokens, name, seed, count)
            options = {"token_ratio": tokens if name.startswith("plane") else 1.0} | STRATEGIES[name]
            if "drop_noise" in options:
                options["drop_noise"] = share
            if run in done or options.get("drop_noise") == 0:
                continue
            chosen = choose(scored, options | {"num_tokens": plane.kept_tokens}, seed)
            model = fresh(data.folder, seed)
            learn(model, batches_of(train, chosen, seed), vocabulary)
            rows.append(NAME, {
                "run": run, "spoilt": share, "sample_ratio": samples, "token_ratio": tokens, "strategy": name,
                "seed": seed, "samples": len(chosen), "tokens": int(sum(kept.sum() for kept in chosen.values())),
                "kept_spoilt": sum(index >= count - bad for index in chosen),
                "base": data.base, **data.measured(model), "steps": STEPS, "learning_rate": RATE,
            } | rows.provenance())  # fmt: skip


if __name__ == "__main__":
    main()
