#!/usr/bin/env bash
# 2,000 rows of Dolly: the base's pass stored, pruned to a quarter, a sweep of four, an adapter, its loss on other rows.
# Killed twice on the way. Under an hour on 2 cores; needs scripts/demo.sh to have run, for the base.
#   bash benchmarks/two_thousand.sh DATA [FOLDER]     DATA has dolly_3k.jsonl: databricks-dolly-15k's first 3,000 rows
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
data="$1/dolly_3k.jsonl"
work="${2:-qtuning-demo/two-thousand}"
model="qtuning-demo/base"
rm -rf "$work"
mkdir -p "$work"

python - "$data" "$work" <<'PY'
import json, sys
from pathlib import Path

rows = [json.loads(line) for line in open(sys.argv[1])]
for name, part in {"train": rows[:2000], "test": rows[2000:2200]}.items():
    with open(Path(sys.argv[2], f"{name}.jsonl"), "w") as file:
        for row in part:
            question = f"{row['instruction']}\n\n{row['input']}".strip()
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": messages}) + "\n")
PY
cat > "$work/sweep.yaml" <<YAML
qst: {reduction_factor: 4}
sweep: {learning_rate: [0.0005, 0.001], reduction_factor: [4, 8]}
validation: 0.1
output_dir: $work/adapter
per_device_train_batch_size: 8
num_train_epochs: 3
lr_scheduler_type: cosine
warmup_steps: 0.1
eval_strategy: epoch
save_strategy: steps
save_steps: 20
seed: 0
YAML

run() { echo "\$ $*"; time "$@" 2>&1 | tr '\r' '\n' | grep -v '%|' ; }
# Kills a command as soon as the files are there that a pattern names.
killed_at() {
    local count="$1" pattern="$2"
    shift 2
    echo "\$ $*"
    "$@" > /dev/null 2>&1 &
    until [ "$(compgen -G "$pattern" | wc -l)" -ge "$count" ]; do sleep 1; done
    kill -KILL $!
    wait $! 2>/dev/null || true
    echo "killed: there are $(compgen -G "$pattern" | wc -l) of $pattern"
}

pass=(qtuning states "$work/train.jsonl" "$model" --output "$work/states" --max-length 1024)
killed_at 3 "$work/states/*.arrow" "${pass[@]}"
run "${pass[@]}"
du -sh "$work/states"
run qtuning prune "$work/states" --output "$work/kept" --sample-ratio 0.25
train=(qtuning train "$work/kept" --config "$work/sweep.yaml")
killed_at 1 "$work/adapter/checkpoint-*" "${train[@]}"
run "${train[@]}"
for name in "$model" "$work/adapter"; do
    run qtuning score "$work/test.jsonl" "$name" --output "$work/test-$(basename "$name").jsonl" --max-length 1024
done
python - "$work" <<'PY'
import json, sys
from pathlib import Path

for name in ("base", "adapter"):
    rows = [json.loads(line) for line in open(Path(sys.argv[1], f"test-{name}.jsonl"))]
    errors = [row["error"] for row in rows if row["error"] is not None]
    print(f"{name}: {sum(errors) / len(errors):.3f} nats a token on {len(errors)} test rows (mean over rows)")
PY
