#!/usr/bin/env bash
# Installs ms-swift and this checkout in .venv-swift and runs the tests of the plugin; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=$(cat pyproject.toml tests/swift/requirements.txt scripts/test_swift.sh | cksum)
if [ "$(cat .venv-swift/installed 2>/dev/null)" != "$wanted" ]; then
    [ -x .venv-swift/bin/python ] || "${PYTHON:-python3}" -m venv .venv-swift
    pip=".venv-swift/bin/python -m pip --disable-pip-version-check install --quiet"
    # PyTorch first and alone: as somebody's open requirement it could be resolved to another build.
    $pip torch==2.13.0
    $pip --requirement tests/swift/requirements.txt
    # Without their requirements: ms-swift's are open ranges, and ours are in the file.
    $pip --no-deps ms-swift==4.6.0
    $pip --no-deps --editable .
    echo "$wanted" > .venv-swift/installed
fi

export OMP_NUM_THREADS=1
.venv-swift/bin/pytest -q tests/swift "$@"
