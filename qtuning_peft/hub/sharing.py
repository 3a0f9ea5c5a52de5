"""Side adapters on the Hub: `qtuning push`, `qtuning pull` and `qtuning info`.

Shared are configuration, weights in safetensors, the completed card and the tokenizer; nothing else.
"""

import json
import re
import shutil
import warnings
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..atomic import replacing
from ..loading import adapter_config
from ..side_tuning import SideTuningConfig
from ..side_tuning.peft.untrusted import LARGEST_HEADER
from .card import MARKS, complete, data_of, listed, load_card, settings_of, split
from .metadata import ROWS, TrainingMetadata, is_hub_name

SHARED = [
    "README.md", CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "chat_template.jinja", "special_tokens_map.json",
    # Not `tokenizer*`: the Hub's patterns reach into folders, and a pickle may be called anything.
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
]  # fmt: skip
LARGEST_LIST, LARGEST_CELL, LARGEST_GATE = 16, 200, 2**10


def push(
    folder: Path, repo: str, *, private: bool = False, revision: str | None = None,
    message: str = "Upload side adapter", base_model: str | None = None, training: TrainingMetadata | None = None,
) -> str:  # fmt: skip
    """Upload an adapter, its card completed by `training`, to `repo`, made if need be; returns the commit's address.

    `base_model` names the base on the Hub, in the card and in the configuration there; the one in `folder` stays.
    """
    config = read_config(folder)
    for name in (*(training.datasets if training else ()), *filter(None, [base_model])):
        if not is_hub_name(name):
            raise ValueError(f"{name} is no name on the Hub, or a folder here; give it as user/name.")
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if base_model:
        # A commit that was recorded is another repository's.
        settings |= {"base_model_name_or_path": base_model, "revision": None}
        config.base_model_name_or_path = base_model
    base = config.base_model_name_or_path
    if base and not is_hub_name(base):
        warnings.warn(
            f"The adapter says that its base is {base}, a folder which others do not have and will see the name of; "
            "push again with --base-model and the base's name on the Hub.",
            stacklevel=2,
        )
    complete(folder / "README.md", config, adapter=repo, training=training)
    files: dict[str, Any] = {name: folder / name for name in SHARED if (folder / name).is_file()}
    files[CONFIG_NAME] = json.dumps(settings, indent=2, sort_keys=True).encode()
    content, api = [CommitOperationAdd(*file) for file in files.items()], HfApi()
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        return str(api.create_commit(repo, content, commit_message=message, revision=revision).commit_url)
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise ValueError("The Hub does not know you; run `hf auth login`, or set HF_TOKEN to a valid token.") from error


def pull(repo: str, folder: Path, revision: str | None = None) -> SideTuningConfig:
    """Download an adapter into a new or empty `folder`, which appears when all of it is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another folder.")
    with replacing(folder) as unfinished:
        snapshot_download(repo, revision=revision, local_dir=unfinished, allow_patterns=SHARED)
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)
        return read_config(unfinished, repo)


def read_config(folder: Path, name: str | None = None) -> SideTuningConfig:
    """The configuration of a side adapter in a folder; `ValueError` when that (called `name`) is none."""
    name = name or str(folder)
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / file).is_file():
            raise ValueError(f"{name} has no {file}, so it is no adapter that can be loaded; save or name another.")
    config = adapter_config(folder, name)
    if not isinstance(config, SideTuningConfig):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{name} is an adapter of the method {method}, not a side network.")
    return config


def describe(adapter: str, revision: str | None = None) -> dict[str, str]:
    """What is known of an adapter (a folder, or `user/name`) without its base: printable names and values, in order."""
    folder = Path(adapter)
    if not folder.is_dir():
        folder = Path(snapshot_download(adapter, revision=revision, allow_patterns=SHARED))
    config, file = read_config(folder, adapter), folder / SAFETENSORS_WEIGHTS_NAME
    with file.open("rb") as weights:
        if (size := int.from_bytes(weights.read(8), "little")) > LARGEST_HEADER:
            raise ValueError(f"{file} has a header of {size} bytes, more than {LARGEST_HEADER}; get the file again.")
    with safe_open(file, framework="pt") as tensors:
        sizes = {name: prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (no dict)
        names = [name for name, size in sizes.items() if ".gate" in name and 0 < size <= LARGEST_GATE]
        gates = [tensors.get_tensor(name).float().sigmoid().mean().item() for name in names[:LARGEST_GATE]]
    known = {"base model": f"{config.base_model_name_or_path}{f' at {config.revision}' if config.revision else ''}"}
    known |= {name: str(value) for name, value in settings_of(config).items()}
    known |= {"parameters": f"{sum(sizes.values()):,}", "size": f"{file.stat().st_size / 2**20:.1f} MiB"}
    if gates:
        mean = sum(gates) / len(gates)
        known["input gates"] = f"{mean:.2f} of the side network's own state ({min(gates):.2f} to {max(gates):.2f})"
    try:
        # In the Hub's cache it is a link.
        card = load_card((folder / "README.md").resolve())
        # Under names that no figure of ours has.
        said = {"training data": card.data.datasets, "language": card.data.language, "licence": card.data.license}
        known |= {name: ", ".join(listed(value)[:LARGEST_LIST]) for name, value in said.items() if value}
        for result in (card.data.eval_results or [])[:LARGEST_LIST]:
            known[f"{result.metric_name or result.metric_type} on {data_of(result)}"] = str(result.metric_value)
        rows = dict(re.findall(r"^\| (\w[\w ]{,30}) \| (.*) \|$", split(card.text, MARKS)[1], re.MULTILINE))
        known |= {name: rows[name].replace("\\|", "|") for name in ROWS if name in rows}
    except ValueError as error:
        known["card"] = f"cannot be shown: {error}"
    return {_line(name): _line(value) for name, value in known.items()}


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:LARGEST_CELL])
