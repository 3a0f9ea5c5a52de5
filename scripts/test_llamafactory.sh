#!/usr/bin/env bash
# Runs the tests with LLaMA-Factory, in an environment of their own in .venv-llamafactory; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-llamafactory
wanted="$(cat pyproject.toml constraints-oldest.txt tests/llamafactory/requirements.txt "$0" | cksum)"
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet"
    # PyTorch first and alone: as somebody's open requirement it could be resolved to another build.
    $pip torch==2.13.0
    $pip --requirement tests/llamafactory/requirements.txt
    # Without their requirements: LLaMA-Factory and its TRL ask for a transformers older than ours.
    $pip --no-deps llamafactory==0.9.5 trl==0.24.0 --editable .
    echo "$wanted" > "$venv/installed"
fi
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q tests/llamafactory "$@"
