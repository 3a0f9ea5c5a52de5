#!/usr/bin/env bash
# Computes states with Ray Data on a Ray of this machine alone, in .venv-ray; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=.venv-ray
wanted="$(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$environment/installed" 2>/dev/null)" != "$wanted" ]; then
    [ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
    pip="$environment/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt"
    # PyTorch first and alone: as somebody's open requirement it could be resolved to another build.
    $pip torch
    $pip --editable ".[ray]" pytest
    echo "$wanted" > "$environment/installed"
fi
OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 "$environment/bin/python" -m pytest -q tests/ray "$@"
