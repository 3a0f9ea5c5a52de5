#!/usr/bin/env bash
# Installs this checkout in .venv and runs every check; arguments go to pytest.
source "$(dirname "$0")/environment.sh"
prepare dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
bash scripts/docs.sh

# Beside the environment, not instead of it: only these packages differ.
oldest=.venv/oldest
if ! cmp -s constraints-oldest.txt "$oldest/installed"; then
    rm -rf "$oldest"
    .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --target "$oldest" -r constraints-oldest.txt
    cp constraints-oldest.txt "$oldest/installed"
fi
PYTHONPATH="$oldest" .venv/bin/pytest -q -n auto --dist worksteal tests/test_files.py tests/test_peft.py \
    tests/test_generation.py tests/test_no_gradient_in_base.py tests/test_positions.py tests/test_trainers.py \
    tests/test_eu_scores.py tests/test_eu_training.py tests/test_trl.py tests/test_safe_loading.py \
    tests/test_model_card.py tests/test_taps.py tests/test_loss.py tests/test_prefix_caching.py \
    tests/test_hidden_state_cache.py tests/test_centering.py tests/test_listener.py tests/test_stored.py \
    tests/test_sweep.py tests/test_hotswap.py

.venv/bin/pytest -n auto --dist worksteal "$@"
