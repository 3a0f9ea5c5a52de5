"""What the benchmarks share: the model, its tokenizer, data, and the description of the machine."""

from __future__ import annotations

import json
import platform
import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.json_extraction.evaluate import load_base, quiet
from examples.json_extraction.smollm2 import prepare_checkpoint

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU float32 multiplies in TF32, as people train there; rows say so.
torch.set_float32_matmul_precision("high" if DEVICE == "cuda" else "highest")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets")


def checkpoint() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32."""
    quiet()
    return prepare_checkpoint(HERE / "results" / "base")


def smollm2_tokenizer() -> Any:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(checkpoint())


def smollm2(quantized: bool = True) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in NF4, or in float32, and its tokenizer; on a GPU, if there is one."""
    folder, tokenizer = checkpoint(), smollm2_tokenizer()
    if quantized:
        return load_base(str(folder), NF4).eval(), tokenizer
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE), tokenizer


def read_data(name: str) -> list[dict[str, Any]]:
    """The rows of a file of `data`."""
    lines = (HERE / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Machine and versions."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else processor(),
        "threads": None if gpu else torch.get_num_threads(),
        **({"float32_matmul": torch.get_float32_matmul_precision()} if gpu else {}),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
