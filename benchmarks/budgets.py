"""Are budgets met? Every ratio, on scored data: the share of samples that is kept, and how error and uncertainty lie.

    python benchmarks/budgets.py

Uses the GSM8K rows that `strategies.py` scores, and their finished parts if they are there.
"""

from __future__ import annotations

from common import HERE, environment, markdown, save, smollm2
from strategies import TRAIN_ROWS, gsm8k

from qtuning_peft.eu_plane import EUPruner, score

RATIOS = (0.125, 0.25, 0.5, 0.75)


def main() -> None:
    """Prune at every ratio, and write results and a table."""
    model, tokenizer = smollm2()
    options = {"resume_dir": HERE / "results" / "parts", "rows_per_part": 64, "scores": ("el2n", "ifd")}
    sets = {"GSM8K": gsm8k("train", 0, TRAIN_ROWS)}
    results = []
    for name, rows in sets.items():
        scored = score(rows, model, tokenizer, **options)
        for ratio in RATIOS:
            pruner = EUPruner(sample_ratio=ratio, token_ratio=0.5, tokenizer=tokenizer).fit(scored)
            kept = scored.map(pruner, batched=True, load_from_cache_file=False)
            thresholds = pruner.fitted.thresholds
            results.append(
                {
                    "source": name, "samples": len(scored), "sample_ratio": ratio, "kept": len(kept),
                    "target": pruner.pruned.target_samples, "counts": pruner.pruned.counts,
                    "kept_tokens": sum(kept["supervised_tokens"]), "tokens": pruner.pruned.tokens,
                    "quantile": thresholds.quantile, "correlation": pruner.pruned.correlation,
                    "model": "SmolLM2-135M-Instruct, NF4", "environment": environment(),
                }
            )  # fmt: skip
    save("budgets", results)
    names = ("noise", "misconception", "redundant", "calibration")
    header = ["rows", "correlation", "ratio", "asked", "kept", *names, "tokens kept", "quantile a"]
    print(
        markdown(
            header,
            [
                [
                    r["source"], f"{r['correlation']:.2f}", r["sample_ratio"], r["target"], r["kept"],
                    *(r["counts"][n] for n in names), f"{r['kept_tokens'] / r['tokens']:.0%}", f"{r['quantile']:.3f}",
                ]
                for r in results
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
