"""What a prompt prefix that all rows share takes off the time of scoring them: a system prompt, or few-shot examples.

    python -m benchmarks.shared_prefix

GSM8K rows behind the chat template's own system prompt, and behind one and four examples besides. The prefix is
computed with every row, or once for all of them; both take turns, and figures are medians over the rounds.
`results/shared_prefix.jsonl` gets a row for each load.
"""

from __future__ import annotations

import time
from statistics import median
from unittest.mock import patch

from benchmarks import rows
from benchmarks.common import smollm2
from benchmarks.document import markdown
from benchmarks.gsm8k import encode, read_rows
from benchmarks.quality.tasks import behind_examples
from qtuning_peft.eu_plane import batching
from qtuning_peft.eu_plane.tokenized import Sample
from qtuning_peft.states import common_prefix

NAME, ROWS, EXAMPLES, ROUNDS, MAX_LENGTH, TOKENS_PER_BATCH = "shared_prefix", 16, (0, 1, 4), 3, 4096, 4096

WAYS = ("whole", "once")


def main() -> None:
    """Measure, and print a table."""
    model, tokenizer = smollm2(quantized=False)
    read, results = read_rows("train", ROWS + max(EXAMPLES)), []
    for examples in EXAMPLES:
        shown = behind_examples(tokenizer, read[ROWS : ROWS + examples])
        encoded = [encode(shown, row, MAX_LENGTH) for row in read[:ROWS]]
        samples = [Sample(index, **row) for index, row in enumerate(encoded)]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for once, times in seconds.items():
                change = ("LEAST_SHARED", 0.0) if once else ("prefix_of", lambda *_: None)
                with patch.object(batching, *change):
                    started = time.perf_counter()
                    batching.run(model, samples, TOKENS_PER_BATCH)
                    times.append((time.perf_counter() - started) / ROWS)
        row = {
            "few_shot_examples": examples, "rows": ROWS, "rounds": ROUNDS, "prefix": len(common_prefix(encoded)),
            "tokens": sum(len(sample.input_ids) for sample in samples) / ROWS,
            "seconds_whole": median(seconds[False]), "seconds_once": median(seconds[True]), **rows.provenance(),
        }  # fmt: skip
        rows.append(NAME, row)
        results.append(row)
    header = ["few-shot examples", "tokens of a row", "of them shared", "in every row, s a row", "once, s a row"]
    lines = [
        [r["few_shot_examples"], round(r["tokens"]), r["prefix"], *(f"{r[f'seconds_{way}']:.2f}" for way in WAYS)]
        for r in results
    ]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
