"""Side adapters on the Hub: `qtuning push`, `qtuning pull` and `qtuning info`.

What is shared is a folder of PEFT's, its card completed: configuration, weights in safetensors, and the tokenizer if
it was saved beside them. Nothing else goes up or comes down, so that optimizer states stay where they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .atomic import replacing
from .model_card import complete
from .side_tuning import SideTuningConfig
from .training_facts import TrainingFacts, cells_of, read_section

SHARED = (
    "README.md", "adapter_config.json", SAFETENSORS_WEIGHTS_NAME, "tokenizer*", "special_tokens_map.json",
    "chat_template.jinja", "eu_report.html",
)  # fmt: skip


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "",
    facts: TrainingFacts | None = None,
) -> str:
    """Upload an adapter.

    Args:
        folder: Where it was saved.
        repo: `user/name` on the Hub; made if it does not exist.
        private: Whether a new repository is private.
        revision: Branch to commit to, by default `main`.
        message: Commit message.
        facts: What the card is to say of the training beside what it says; metadata alone change nothing else.

    Returns:
        The address of the commit.

    Raises:
        ValueError: when the folder holds no side adapter.
    """
    config = read_config(folder)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter with save_pretrained() first.")
    complete(folder / "README.md", config, adapter=repo, facts=facts)
    api = HfApi()
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo, folder_path=folder, revision=revision, allow_patterns=list(SHARED),
        commit_message=message or "Upload side adapter",
    )  # fmt: skip
    return str(commit.commit_url)


def pull(repo: str, folder: Path, revision: str | None = None) -> SideTuningConfig:
    """Download an adapter into `folder`, which appears when all of it is there.

    Args:
        repo: `user/name` on the Hub.
        folder: New, or empty.
        revision: Branch, tag or commit.

    Raises:
        ValueError: when the folder is not empty, or the repository holds no side adapter.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another folder.")
    with replacing(folder) as unfinished:
        snapshot_download(repo, revision=revision, local_dir=unfinished, allow_patterns=list(SHARED))
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)
        config = read_config(unfinished, repo)
        if folder.is_dir():
            folder.rmdir()
    return config


def read_config(adapter: Path | str, name: str | None = None, revision: str | None = None) -> SideTuningConfig:
    """The configuration of a side adapter in a folder or on the Hub.

    Raises:
        ValueError: when there is none.
    """
    config = PeftConfig.from_pretrained(os.fspath(adapter), **({"revision": revision} if revision else {}))
    if not isinstance(config, SideTuningConfig):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{name or adapter} is an adapter of the method {method}, not a side network.")
    return config


def describe(adapter: str, revision: str | None = None) -> Iterator[tuple[str, str]]:
    """What is known of an adapter without its base: names and values, in the order to show.

    Args:
        adapter: A folder, or `user/name` on the Hub.
        revision: Branch, tag or commit, on the Hub.
    """
    config = read_config(adapter, revision=revision)
    folder = Path(adapter)
    if not folder.is_dir():
        folder = Path(snapshot_download(adapter, revision=revision, allow_patterns=list(SHARED)))
    yield "base model", f"{config.base_model_name_or_path}" + (f" at {config.revision}" if config.revision else "")
    yield "shape of the base", f"{config.base_num_layers} blocks, hidden size {config.base_hidden_size}"
    settings = ("r", "downsample", "mixing", "layers_to_transform", "num_side_heads", "task_type")
    yield "settings", ", ".join(f"{name} {getattr(config, name)}" for name in settings if getattr(config, name))
    file = folder / SAFETENSORS_WEIGHTS_NAME
    with safe_open(file, framework="pt") as tensors:
        keys = list(tensors.keys())
        yield "parameters", f"{sum(prod(tensors.get_slice(key).get_shape()) for key in keys):,}"
        yield "size", f"{file.stat().st_size / 2**20:.1f} MiB"
        shares = [tensors.get_tensor(key).float().sigmoid().mean().item() for key in keys if ".gate" in key]
    if shares:
        yield (
            "input gates",
            (
                f"{sum(shares) / len(shares):.2f} of the side network's own state on average, "
                f"{min(shares):.2f} to {max(shares):.2f} over its blocks"
            ),
        )
    if (folder / "README.md").is_file():
        card = ModelCard.load(folder / "README.md")
        yield from _of_metadata(card.data)
        yield from ((name, value) for name, value in read_section(card.text) if name != "training data")


def _of_metadata(data: Any) -> Iterator[tuple[str, str]]:
    for name, value in (("training data", data.datasets), ("language", data.language), ("licence", data.license)):
        if value:
            yield name, ", ".join([value] if isinstance(value, str) else value)
    for result in data.eval_results or []:
        dataset, metric, value = cells_of(result)
        yield f"{metric} on {dataset}", value
