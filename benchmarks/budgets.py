"""Are budgets met? For every ratio: how many samples are kept, and how error and uncertainty correlate.

    python -m benchmarks.budgets

Uses the GSM8K rows that `strategies` scores, and their finished parts if they are there. `results/budgets.jsonl` gets
one row per ratio.
"""

from __future__ import annotations

from benchmarks import rows
from benchmarks.common import HERE, environment, smollm2
from benchmarks.document import markdown
from benchmarks.strategies import TRAIN_ROWS, gsm8k
from qtuning_peft.eu_plane import EUPruner, score

RATIOS = (0.125, 0.25, 0.5, 0.75)


def main() -> None:
    """Prune at every ratio, and write results and a table."""
    model, tokenizer = smollm2()
    options = {"resume_dir": HERE / "results" / "parts", "rows_per_part": 64, "scores": ("el2n", "ifd")}
    scored = score(gsm8k("train", 0, TRAIN_ROWS), model, tokenizer, **options)
    results = []
    for ratio in RATIOS:
        pruner = EUPruner(sample_ratio=ratio, token_ratio=0.5, tokenizer=tokenizer).fit(scored)
        kept = scored.map(pruner, batched=True, load_from_cache_file=False)
        results.append(
            {
                "source": "GSM8K", "samples": len(scored), "sample_ratio": ratio, "kept": len(kept),
                "target": pruner.pruned.target_samples, "counts": pruner.pruned.counts,
                "kept_tokens": sum(kept["supervised_tokens"]), "tokens": pruner.pruned.tokens,
                "quantile": pruner.fitted.thresholds.quantile, "correlation": pruner.pruned.correlation,
                "model": "SmolLM2-135M-Instruct, NF4", "environment": environment(),
            }
        )  # fmt: skip
    rows.replace("budgets", results)
    names = ("noise", "misconception", "redundant", "calibration", "topped_up", "middle")
    header = ["rows", "correlation", "ratio", "target", "kept", *names, "tokens kept", "quantile a"]
    lines = [
        [
            row["source"], f"{row['correlation']:.2f}", row["sample_ratio"], row["target"], row["kept"],
            *(row["counts"][name] for name in names), f"{row['kept_tokens'] / row['tokens']:.0%}",
            f"{row['quantile']:.3f}",
        ]
        for row in results
    ]  # fmt: skip
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
