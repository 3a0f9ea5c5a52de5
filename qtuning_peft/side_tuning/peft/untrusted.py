"""An untrusted adapter is data: what is checked in its files before any of it is used.

PEFT and transformers read the config, attach the adapter, and only then open the weights: a bad file would be noticed
with a random side network already in the base. So a config remembers where it was read (`Origin`), and the tuner
checks the weights there as a whole (`check_file`) before it attaches anything. The same checks of names, shapes, dtypes
and values guard tensors on their way into a side network that exists already.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

CONTAINER = "qst_side_network"
FILE_DTYPES = ("F32", "F16", "BF16")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGEST_TEXT = 2**10
NO_SAFETENSORS = (
    f"{{}} has no readable {SAFETENSORS_WEIGHTS_NAME}, and {WEIGHTS_NAME} is not read because it is a pickle, which "
    "can carry code; ask for the adapter as save_pretrained() writes it."
)
LARGEST_HEADER = 2**24
LARGEST_TOKENIZER = 2**26


def check_text(name: str, value: object) -> None:
    """Check that `value` is one printable line, or `None`."""
    if value is not None and not (isinstance(value, str) and len(value) <= LARGEST_TEXT and value.isprintable()):
        raise ValueError(f"{name} is {short(value)}; give one line of at most {LARGEST_TEXT} characters, or none.")


def check_names(name: str, value: object) -> None:
    """Check that `value` is a short list of module names, or `None`."""
    if value is None:
        return
    if not isinstance(value, (list, tuple, set)) or len(value) > LARGEST_TEXT:
        raise ValueError(f"{name} is {short(value)}; give a list of module names.")
    for item in value:
        if not item or not isinstance(item, str):
            raise ValueError(f"{name} holds {short(item)}; give a list of module names.")
        check_text(name, item)


@dataclass(frozen=True)
class Origin:
    """Where a config was read, and so where PEFT will look for its weights: a folder, or a repository on the Hub."""

    folder: str
    subfolder: str | None = None
    download: Mapping[str, Any] = field(default_factory=dict)

    def weights(self) -> Path:
        """The safetensors file; a `ValueError` when there is none, or only a pickle, which PEFT would read."""
        name = SAFETENSORS_WEIGHTS_NAME
        if os.path.isdir(self.folder):
            file = Path(self.folder, self.subfolder or "", name)
            # Not `exists`, as PEFT asks: a pipe or a device would be read for ever.
            if not file.is_file():
                raise ValueError(NO_SAFETENSORS.format(file.parent))
            return file
        try:
            return Path(hf_hub_download(self.folder, name, subfolder=self.subfolder, **self.download))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise ValueError(NO_SAFETENSORS.format(self.folder)) from error

    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer beside the adapter, if there is one."""
        folder = os.path.join(self.folder, self.subfolder or "")
        return tokenizer_fingerprint(folder, self.download.get("revision"), self.download)


def check_file(file: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Check a file of weights against the shapes and dtypes of `expected`: size, names, shapes, dtypes, then values."""
    limit = 4 * sum(tensor.numel() for tensor in expected.values()) + LARGEST_HEADER
    if file.stat().st_size > limit:
        raise ValueError(
            f"{file} is {file.stat().st_size} bytes large and its configuration needs at most {limit}; "
            "it belongs to another configuration or base."
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            check_keys(expected, tensors.keys())
            for key in expected:
                header = tensors.get_slice(key)
                check_shape(key, header.get_shape(), expected[key])
                if header.get_dtype() not in FILE_DTYPES:
                    raise ValueError(_wrong_dtype(key, header.get_dtype()))
            for key in expected:
                check_values(key, tensors.get_tensor(key), expected[key])
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no valid safetensors file ({_one_line(error)}); it is damaged or cut off, get it again."
        ) from error


def check_keys(expected: Iterable[str], given: Iterable[str]) -> None:
    """Check that no tensor is missing, and none too many."""
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing:
        raise ValueError(f"The adapter lacks {_some(missing)}; it was made with another configuration or is damaged.")
    if extra:
        raise ValueError(
            f"The adapter has {_some(extra)} too many; it was made with another configuration, is damaged, or holds "
            "resized embeddings, which save_pretrained(save_embedding_layers=False) leaves out."
        )


def check_shape(key: str, shape: Iterable[int], expected: torch.Tensor) -> None:
    """Check the shape of one tensor."""
    if tuple(shape) != tuple(expected.shape):
        raise ValueError(
            f"The adapter's {_name(key)} has shape {tuple(shape)}, the side network needs {tuple(expected.shape)}; "
            "it was made for another base or configuration."
        )


def check_values(key: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that one tensor holds floating point numbers, finite also in the side network's dtype."""
    if tensor.dtype not in DTYPES:
        raise ValueError(_wrong_dtype(key, str(tensor.dtype)))
    if not tensor.is_meta and not bool(torch.isfinite(tensor.to(expected.dtype)).all()):
        raise ValueError(
            f"The adapter's {_name(key)} holds values that are not finite; the file is damaged or training diverged."
        )


def _wrong_dtype(key: str, dtype: str) -> str:
    return f"The adapter's {_name(key)} has dtype {dtype}; save it as float32, float16 or bfloat16."


def _name(key: str) -> str:
    # In the words of the side network where it is one of its tensors; a file may hold anything as a name.
    name = key.rpartition(f".{CONTAINER}.")[2][:200]
    return name if name.isprintable() else repr(name)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more tensors" if len(keys) > 3 else ""
    return ", ".join(_name(key) for key in keys[:3]) + more


def _one_line(error: Exception) -> str:
    return "".join(letter for letter in " ".join(str(error).split()) if letter.isprintable())[:200]


def cached_commit(name: str | None) -> str | None:
    """Commit that the base `name` was loaded from, of those in the Hub's cache; `None` where it is not certain.

    transformers keeps no commit of a model. Commits with the same weights and configuration are one.
    """
    if not name or os.path.isdir(name):
        return None
    repo = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    commits = {file.parent for file in repo.glob("snapshots/*/*.safetensors")}
    files = {frozenset(map(os.path.realpath, [*c.glob("*.safetensors"), c / "config.json"])) for c in commits}
    main = repo / "refs" / "main"
    names = sorted(commit.name for commit in commits)
    if len(files) != 1:
        return None
    return head if main.is_file() and (head := main.read_text()) in names else names[-1]


def tokenizer_fingerprint(
    folder: str | None, revision: str | None = None, download: Mapping[str, Any] | None = None
) -> str | None:
    """What tells two vocabularies apart: 16 hex digits of SHA-256 over every token and its id.

    Only what is on this machine is looked at. The whole file would not do: libraries write the same tokenizer
    differently, and padding and truncation are saved in it. `None` where no such file can be read.

    Args:
        folder: A folder with a ``tokenizer.json``, or the id of a repository in the Hub's cache.
        revision: The repository's revision.
        download: May hold the `cache_dir`.
    """
    try:
        file = Path(folder or "", "tokenizer.json")
        if not os.path.isdir(folder or ""):
            cached = try_to_load_from_cache(
                folder or "", "tokenizer.json", cache_dir=(download or {}).get("cache_dir"), revision=revision
            )
            if not isinstance(cached, str):
                return None
            file = Path(cached)
        if not file.is_file() or file.stat().st_size > LARGEST_TOKENIZER:
            return None
        content = json.loads(file.read_bytes())
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
        tokens = vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        listing = json.dumps(sorted((int(index), str(token)) for token, index in tokens.items()))
        return hashlib.sha256(listing.encode()).hexdigest()[:16]
    except (OSError, ValueError, OverflowError, RecursionError, LookupError, TypeError, AttributeError):
        return None
