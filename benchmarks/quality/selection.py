"""Which rows, and which of their tokens, to train on: strategies at equal tokens and steps, on clean and spoilt rows.

    python -m benchmarks.quality.selection --data FOLDER             resumes where it was interrupted

SmolLM2-135M-Instruct in float32 and a side network of the default settings, which learns from 320 rows of GSM8K, some
of them spoilt (answers of other questions, shuffled, with typos, looped). The base runs once over all rows; everything
else is read from its states. Every strategy keeps as many supervised tokens as the plane's share of the samples times
`token_ratio`, and takes 20 steps. Measured as Q-Tuning does, on what was not trained on as well: loss and accuracy of
the next token on GSM8K test rows and on Dolly rows; the loss of GSM8K also on the 80 % of tokens that are easiest to
the base and on the hardest 20 %. Rows go to `results/selection.jsonl`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import methods, rows
from benchmarks.common import DEVICE, smollm2, smollm2_tokenizer
from benchmarks.gsm8k import encode
from benchmarks.noise import TOGETHER, corrupted
from benchmarks.quality.from_states import RATE, Rows, final_states, fresh, stored
from benchmarks.quality.learner import factor
from benchmarks.quality.tasks import load
from benchmarks.quality.texts import texts_of
from benchmarks.step import positive
from qtuning_peft import EUPruner, load_states
from qtuning_peft.eu_plane.selection import KEEP, TRIM
from qtuning_peft.head import causal_model

NAME, TRAIN_ROWS, STEPS, HARD = "selection", 320, 20, 0.2
TOKENS = 0.5  # the plane's token_ratio, which is everybody's budget
STRATEGIES: dict[str, dict[str, Any]] = {
    "plane x tokens (Q-Tuning)": {"token_ratio": TOKENS},
    "plane, whole rows": {},
    "random": {"strategy": "random"},
    "random, twice the rows, half their tokens": {
        "strategy": "random", "token_ratio": 0.5, "token_strategy": "random"
    },
    "highest entropy": {"strategy": "entropy"},
    "highest error": {"strategy": "highest_perplexity"},
    "lowest error": {"strategy": "lowest_perplexity"},
    "ifd": {"strategy": "ifd"},
    "shortest (removes the longest)": {"strategy": "shortest"},
    "longest": {"strategy": "longest"},
    "random, noisiest dropped": {"strategy": "random", "drop_noise": 0.0},
    "plane, whole rows, noisiest dropped": {"drop_noise": 0.0},
}  # fmt: skip


def spoilt_rows(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row, its answer spoilt in one of the four ways that a score of noise should find, by turns."""
    draw = random.Random(0)
    return [
        row | {"answer": corrupted(TOGETHER[index % len(TOGETHER)], row["answer"], draw.choice(texts)["answer"], draw)}
        for index, row in enumerate(texts)
    ]


@torch.no_grad()
def predictions(model: Any, found: Rows) -> tuple[Tensor, Tensor]:
    """Error in nats and whether the likeliest token is right, of every supervised token, (tokens,)."""
    head, errors, right = causal_model(model).get_output_embeddings(), [], []
    for states, targets in final_states(model, found):
        logits = head(states).float()
        errors.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
        right.append(logits.argmax(-1) == targets)
    return torch.cat(errors), torch.cat(right).float()


def learn(model: Any, found: Rows, chosen: dict[int, Tensor], seed: int) -> None:
    """Train on the tokens `chosen` (bool) of each row, in `STEPS` steps of about as many tokens."""
    optimizer = methods.optimizer(methods.find("side"), model, RATE)
    order = random.Random(seed).sample(sorted(chosen), len(chosen))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor(step, STEPS)
        places = order[step::STEPS] or [order[step % len(order)]]  # fewer rows than steps
        parts = [(*found.rows[index], chosen[index]) for index in places]
        states = torch.cat([states[:, kept] for states, _, kept in parts], dim=1)
        labels = torch.cat([torch.tensor([-100], device=DEVICE), *(labels[kept] for _, labels, kept in parts)])
        model(states=states, labels=labels, state_layers=found.layers).loss.backward()
        nn.utils.clip_grad_norm_(methods.trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()


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
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of GSM8K's and Dolly's files")
    parser.add_argument("--spoilt", type=float, nargs="+", default=[0.0, 0.2, 0.4], help="shares (0 0.2 0.4)")
    parser.add_argument("--samples", type=float, nargs="+", default=[0.25], help="the plane's sample_ratio (0.25)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[*STRATEGIES], metavar="STRATEGY")
    parser.add_argument("--rows", type=positive, default=TRAIN_ROWS, help=f"training rows ({TRAIN_ROWS})")
    parser.add_argument("--test-rows", type=positive, default=60, help="test rows of each set (60)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data order and weights (0 1 2)")
    arguments = parser.parse_args()
    tokenizer, count = smollm2_tokenizer(), arguments.rows
    task, dolly = (load(name, tokenizer, arguments.data) for name in ("gsm8k", "dolly"))
    spoilt = spoilt_rows(texts_of("gsm8k", arguments.data).train[: round(max(arguments.spoilt) * count)])
    sets = {
        "train": task.train[:count], "spoilt": [encode(tokenizer, row, 512) for row in spoilt],
        "GSM8K": task.test[: arguments.test_rows], "Dolly": dolly.test[: arguments.test_rows],
    }  # fmt: skip
    folders = {
        name: stored(f"selection-{name}-{len(found)}", found, lambda: smollm2(False)[0], scores=("ifd", "noise"))
        for name, found in sets.items()
        if found
    }
    parts = {name: Rows.of(folder) for name, folder in folders.items()}
    scores = {name: load_states(folder).remove_columns("states") for name, folder in folders.items()}
    base = {name: predictions(fresh(folders["train"], 0), parts[name]) for name in ("GSM8K", "Dolly")}
    hard = base["GSM8K"][0] > base["GSM8K"][0].quantile(1 - HARD)
    done = {tuple(row["run"]) for row in rows.read(NAME)}
    for share in arguments.spoilt:
        bad = round(share * count)
        train, scored = (
            Rows(parts["train"].layers, parts["train"].rows[bad:]),
            scores["train"].select(range(bad, count)),
        )
        if bad:
            train.rows = train.rows + parts["spoilt"].rows[:bad]
            scored = concatenate_datasets([scored, scores["spoilt"].select(range(bad))])
        for samples in arguments.samples:
            plane = EUPruner(sample_ratio=samples, token_ratio=TOKENS).fit(scored).pruned
            assert plane is not None
            for seed in arguments.seeds:
                for name in tqdm(arguments.strategies, f"{share:.0%} spoilt, {samples:.1%}, seed {seed}", unit="run"):
                    run = (share, samples, name, seed, count)
                    options = STRATEGIES[name] | {"num_tokens": plane.kept_tokens}
                    if "drop_noise" in options:
                        options["drop_noise"] = share
                    if run in done or options.get("drop_noise") == 0:
                        continue
                    chosen = choose(scored, options, seed)
                    model = fresh(folders["train"], seed)
                    learn(model, train, chosen, seed)
                    after = {of: predictions(model, parts[of]) for of in base}
                    rows.append(NAME, {
                        "run": run, "spoilt": share, "sample_ratio": samples, "strategy": name, "seed": seed,
                        "samples": len(chosen), "tokens": int(sum(kept.sum() for kept in chosen.values())),
                        "kept_spoilt": sum(index >= count - bad for index in chosen),
                        "base": measured(base, hard), **measured(after, hard), "steps": STEPS, "learning_rate": RATE,
                    } | rows.provenance())  # fmt: skip


def measured(found: dict[str, tuple[Tensor, Tensor]], hard: Tensor) -> dict[str, float]:
    """Means over the supervised tokens."""
    errors = found["GSM8K"][0]
    return {
        "loss": errors.mean().item(), "accuracy": found["GSM8K"][1].mean().item(),
        "easy": errors[~hard].mean().item(), "hard": errors[hard].mean().item(),
        "dolly_loss": found["Dolly"][0].mean().item(), "dolly_accuracy": found["Dolly"][1].mean().item(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
