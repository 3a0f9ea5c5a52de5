"""Loading a model, or an adapter with its base, and its tokenizer, as the command line and the integrations do."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # lazily
from peft import AutoPeftModelForCausalLM, PeftConfig
from peft.utils import CONFIG_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .side_tuning import SideTuningConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str, load_in_4bit: bool = False, gguf_file: str | None = None, dtype: str = "auto"
) -> tuple[Any, Any]:
    """A model, or an adapter with its base, for inference, on the GPU if there is one, and its tokenizer.

    Args:
        name: A folder, or a name on the Hub.
        load_in_4bit: Quantize to NF4 with bitsandbytes.
        gguf_file: GGUF file in the model's folder.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"` for the checkpoint's.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    if not Path(name).exists():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"There is no folder {name}, and no model of this name; check its spelling.") from error
    gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": torch.cuda.current_device()} if gpu else None}
    if load_in_4bit:
        compute = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
        if dtype == "auto":
            arguments["dtype"] = compute
    gguf: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    if (Path(name) / CONFIG_NAME).is_file():
        adapter_config(Path(name))
        model = AutoPeftModelForCausalLM.from_pretrained(name, **arguments, **gguf)
        has_tokenizer = (Path(name) / "tokenizer_config.json").is_file()
        return model.eval(), load_tokenizer(name if has_tokenizer else model.get_base_model().config._name_or_path)
    return AutoModelForCausalLM.from_pretrained(name, **arguments, **gguf).eval(), load_tokenizer(name, **gguf)


def adapter_config(folder: Path, name: str | None = None) -> PeftConfig:
    """The configuration of an adapter in a folder (called `name`); `ValueError` when PEFT does not know its method."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (LookupError, TypeError) as error:
        reason = f"has an {CONFIG_NAME} of an unknown method ({error!r:.200}); upgrade PEFT."
        raise ValueError(f"{name or folder} {reason}") from error


def side_tuning_config(folder: Path) -> SideTuningConfig:
    """The configuration of the side network in a folder, to be served; `ValueError` when it is another adapter."""
    config = adapter_config(folder)
    if not isinstance(config, SideTuningConfig):
        raise ValueError(f"{folder} holds an adapter of {config.peft_type}, but side networks are served here.")
    return config


def load_tokenizer(name: str, **arguments: Any) -> Any:
    """The tokenizer of a model: a folder, or a name on the Hub; further arguments as transformers takes them."""
    return AutoTokenizer.from_pretrained(name, **arguments)
