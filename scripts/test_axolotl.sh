#!/usr/bin/env bash
# Runs Axolotl's own commands with the plugin, in the two newest releases, each in an environment of its own in
# .venv-axolotl; arguments go to pytest. The releases ask for Python 3.12 and CUDA packages that a CPU does not need.
set -euo pipefail
cd "$(dirname "$0")/.."

# No GPU, no usage statistics, and no questions to the Hub, of which the tests need nothing.
export AXOLOTL_DO_NOT_TRACK=1 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests \
    TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled

for release in ${AXOLOTL:-0.21.0 0.20.0}; do
    environment=.venv-axolotl/$release
    wanted="$(cat pyproject.toml "tests/axolotl/requirements-$release.txt" | cksum)"
    if [ "$(cat "$environment/installed" 2>/dev/null)" != "$wanted" ]; then
        [ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
        pip="$environment/bin/python -m pip --disable-pip-version-check install --quiet"
        $pip torch==2.13.0
        $pip -r "tests/axolotl/requirements-$release.txt"
        $pip --no-deps bitsandbytes==0.50.2 evaluate==0.4.1 fastcore sentencepiece scipy
        # Triton is imported, but nothing of it runs on a CPU.
        $pip --no-deps triton
        $pip --no-deps axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6
        $pip --no-deps --ignore-requires-python "axolotl==$release"
        $pip --no-deps --editable .
        echo "$wanted" > "$environment/installed"
    fi
    PATH="$PWD/$environment/bin:$PATH" python -m pytest tests/axolotl "$@"
done
