"""What a folder of states holds, and what it was made with.

The parts that scoring writes (see `eu_plane.dataset`), the base's head and configuration, the projection where states
are projected, and a manifest, which is written last.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open

from ..side_tuning import SideTuningConfig
from ..states.projection import Projection, check_format
from .view import VIEW, read_view

MANIFEST, HEAD, PROJECTED = "states.json", "head.safetensors", "projection.safetensors"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a folder of states was made with.

    Attributes:
        base: The base's name or folder.
        layers: The tapped blocks, of `num_layers`.
        fingerprint: Of the base, its quantization, tokenizer and settings.
        weights: Fingerprint of the base's weights alone, where the engine shows them.
        tokenizer: Fingerprint of the tokenizer's vocabulary, where known.
        parts: Files of the rows, in order; each ends in a checksum of its own.
        head: Checksum of the head's file.
    """

    base: str
    layers: tuple[int, ...]
    num_layers: int
    hidden_size: int
    format: str
    fingerprint: str
    weights: str
    tokenizer: str | None
    parts: tuple[str, ...]
    head: str
    rows: int
    version: int = VERSION

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Of a folder of states; a `ValueError` when it is none, or of another version."""
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            found = cls(**{f.name: content[f.name] for f in fields(cls)})
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{folder} holds no finished states ({type(error).__name__}: {error!s:.100}); compute them again."
            ) from error
        if found.version != VERSION:
            raise ValueError(f"{folder} has states of version {found.version}, not {VERSION}; compute them anew.")
        check_format(found.format)
        if any(Path(name).name != name for name in found.parts):
            raise ValueError(f"{folder / MANIFEST} names parts outside of the folder; get it again.")
        return found


def holds_states(folder: Path) -> bool:
    """Whether `folder` is one of states, or a view of one."""
    return (folder / MANIFEST).is_file() or (folder / VIEW).is_file()


def states_of(folder: str | Path) -> Path:
    """The folder that holds the states of `folder`: itself, or the one that it is a view of."""
    folder = Path(folder)
    if not (folder / VIEW).is_file():
        return folder
    states, checksum = read_view(folder)
    if checksum_of(states / MANIFEST) != checksum:
        raise ValueError(f"{folder} is a view of {states}, which is missing or has changed; prune the states again.")
    return states


def read_projection(folder: Path) -> tuple[Projection, str]:
    """The projection in `folder`, and the fingerprint of what it was fitted to.

    Raises:
        ValueError: when it is missing or damaged.
    """
    try:
        with safe_open(folder / PROJECTED, "pt") as file:
            projection = Projection.of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            fingerprint, _, fitted_to = (file.metadata() or {}).get("fingerprint", "").partition(" ")
            if fingerprint == projection.fingerprint():
                return projection, fitted_to
    except (OSError, SafetensorError, LookupError, TypeError):
        pass
    raise ValueError(f"{folder / PROJECTED} is missing or damaged; compute the states again in another folder.")


def checksum_of(file: Path) -> str:
    """Of a file's content; of none where it is missing."""
    digest = xxhash.xxh3_128()
    if file.is_file():
        with file.open("rb") as content:
            while chunk := content.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()


def refuse_attention(config: SideTuningConfig) -> None:
    """Refuse a side network that reads more than what is stored."""
    if config.side_attention:
        raise ValueError(
            "side_attention is True, but side blocks that attend read tokens whose states are not stored; leave it out."
        )
