#!/usr/bin/env bash
# Runs side tuning on every quantization that a CPU can run, each with the package that makes it; arguments go to pytest.
# QUANTIZER_ROWS=1 leaves the rows of the table in docs/models.md, which `python -m benchmarks.models_page` writes.
source "$(dirname "$0")/environment.sh"
prepare dev

# Beside .venv, not instead of it: only what it lacks is installed.
beside() {
    local environment=.venv-quantizers/$1 requirements=tests/quantizers/requirements-$1.txt
    if [ "$(cat "$environment/installed" 2>/dev/null)" = "$(cksum < "$requirements")" ]; then return; fi
    rm -rf "$environment"
    .venv/bin/python -m venv "$environment"
    local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    packages=$("$environment/bin/python" -c "$packages")
    echo "import site; site.addsitedir('$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
        > "$packages/tested.pth"
    local pip="$environment/bin/python -m pip --disable-pip-version-check install --quiet"
    $pip "setuptools>=77" wheel
    $pip --no-deps --no-build-isolation -r "$requirements"
    # torchvision's wheel is built for CUDA: beside a CPU build of PyTorch, two operators that it describes are missing.
    if grep -q torchvision "$requirements"; then
        printf 'import torch\nfor name in ("nms", "qnms"):\n    torch.library.define(f"torchvision::{name}", %s)\n' \
            '"(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"' > "$packages/sitecustomize.py"
    fi
    cksum < "$requirements" > "$environment/installed"
}

failed=0
run() { QUANTIZERS="$2" "$1/bin/python" -m pytest -n 0 tests/quantizers "${arguments[@]}" || failed=$?; }
arguments=("$@")
beside shared
beside gptq
run .venv "bitsandbytes transformers"
run .venv-quantizers/shared "torchao hqq compressed-tensors auto-round"
run .venv-quantizers/gptq gptqmodel
exit $failed
