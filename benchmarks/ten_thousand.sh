#!/usr/bin/env bash
# 10,000 rows: scored, killed half-way, resumed and pruned. About ten minutes on 2 cores; needs scripts/demo.sh to have run.
#   bash benchmarks/ten_thousand.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
work="${1:-qtuning-demo/ten-thousand}"
model="qtuning-demo/base"
mkdir -p "$work"
rm -rf "$work"/scored* "$work"/kept* "$work"/plane*

# Sums, one in ten of them wrong.
python - > "$work/rows.jsonl" <<'PY'
import json, random
draw = random.Random(0)
for _ in range(10_000):
    a, b = draw.randrange(10, 100), draw.randrange(10, 100)
    wrong = draw.random() < 0.1
    print(json.dumps({"prompt": f"{a} + {b} =", "completion": f" {a + b + wrong * draw.randrange(1, 20)}", "wrong": wrong}))
PY

score=(qtuning score "$work/rows.jsonl" "$model" --output "$work/scored.parquet" --no-chat-template)
echo "\$ ${score[*]}"
"${score[@]}" &
until [ "$(ls "$work/scored.parquet.parts" 2>/dev/null | grep -c '\.arrow$')" -ge 20 ]; do sleep 1; done
kill -KILL $!
wait $! 2>/dev/null || true
echo
echo "killed with $(ls "$work/scored.parquet.parts" | grep -c '\.arrow$') of 40 parts finished; the output $([ -e "$work/scored.parquet" ] && echo exists || echo 'does not exist yet')"

echo "\$ ${score[*]}"
time "${score[@]}"

for command in \
    "qtuning prune $work/scored.parquet --output $work/kept.jsonl --sample-ratio 0.25 --token-ratio 0.5" \
    "qtuning plot $work/scored.parquet --output $work/plane.html --sample-ratio 0.25 --token-ratio 0.5 --tokenizer $model"
do
    echo "\$ $command"
    $command
done
wc -l "$work/kept.jsonl"
