#!/usr/bin/env bash
# Installs this checkout in .venv and runs every check; arguments go to pytest.
source "$(dirname "$0")/environment.sh"
prepare dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy

# The oldest supported PEFT translates adapter names in files by other rules than the newest.
oldest=.venv/oldest-peft
[ -d "$oldest" ] || .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --target "$oldest" peft==0.20.0
PYTHONPATH="$oldest" .venv/bin/pytest -q tests/test_files.py tests/test_peft.py

.venv/bin/pytest "$@"
