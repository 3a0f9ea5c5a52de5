"""The base's pass as data: scores and hidden states of every row, computed once; from then on training needs no base.

    h = mix(f_N, g_N)         f_N and the taps of g are read from disk;  the head alone is in memory

The base never changes (QST, ACL 2024, section 3), so what it computes for a row is a fact about the row. A folder of
states holds the parts that scoring writes (see `eu_plane.dataset`), the head, the base's configuration, and a manifest
that says what they were made with.
"""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset, concatenate_datasets
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from .atomic import alone_with, replacing
from .eu_plane.dataset import read_part, score_parts
from .eu_plane.engine import Engine, engine_of
from .eu_plane.scorer import EUScorer
from .reading import IGNORE_INDEX
from .side_tuning import SideTuningConfig
from .side_tuning.follow import find_decoder
from .side_tuning.peft.untrusted import tokenizer_fingerprint
from .states.format import FORMATS

MANIFEST, HEAD = "states.json", "head.safetensors"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a folder of states was made with.

    Attributes:
        base: The base's name or folder.
        layers: The tapped blocks, of `num_layers`.
        fingerprint: Of the base, its quantization, tokenizer and settings.
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
        FORMATS.check(found.format)
        if any(Path(name).name != name for name in found.parts):
            raise ValueError(f"{folder / MANIFEST} names parts outside of the folder; get it again.")
        return found


def compute_states(
    dataset: Dataset, model: nn.Module | Engine, tokenizer: Any, config: SideTuningConfig, folder: str | Path, *,
    states_format: str = "bfloat16", rows_per_part: int = 32, progress: bool = True, **scoring: Any,
) -> Dataset:  # fmt: skip
    """Score a data set and store the states that a side network of `config` would read, in one pass of the base.

    Killed and started again, it computes only what is not there.

    Args:
        dataset, model, tokenizer: As in [`score`]; the model is the base alone, or another [`Engine`].
        config: Whose blocks are tapped: `tap_every` or `layers_to_transform`.
        folder: Where the states go.
        states_format: bfloat16, float16, float32 or int8.
        rows_per_part: Rows in a file.
        progress: Show a progress bar.
        **scoring: Of [`EUScorer`].

    Returns:
        The rows as [`load_states`] reads them.
    """
    _refuse_attention(config)
    folder, engine = Path(folder), engine_of(model)
    shape, head = engine.shape(), engine.head()
    scorer = EUScorer(engine, tokenizer, states=config, states_format=states_format, **scoring)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_with(folder):
        rows = score_parts(dataset.with_format(None), scorer, folder, rows_per_part, progress)
        parts = [file.name for file, _ in rows]
        with replacing(folder / HEAD) as unfinished:
            save_file(head, unfinished)
        settings = engine.config.to_dict()
        settings.pop("quantization_config", None)
        with replacing(folder / "config.json") as unfinished:
            unfinished.write_text(json.dumps(settings, indent=1, default=str), encoding="utf-8")
        manifest = Manifest(
            engine.name, scorer.layers, shape.num_layers, shape.hidden_size, states_format, scorer.fingerprint(),
            tokenizer_fingerprint(engine.name, None), tuple(parts), _checksum(folder / HEAD), len(dataset),
        )  # fmt: skip
        # Last: a folder without it is not finished.
        with replacing(folder / MANIFEST) as unfinished:
            unfinished.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
    return load_states(folder)


def load_states(folder: str | Path) -> Dataset:
    """The rows of a folder of states, mapped from its files; a `ValueError` when one is missing or damaged."""
    folder = Path(folder)
    manifest = Manifest.read(folder)
    files = [folder / name for name in manifest.parts]
    for file in files:
        if read_part(file) is None:
            raise ValueError(f"{file} is missing or damaged; compute the states again, which keeps the other parts.")
    rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    if len(rows) != manifest.rows:
        raise ValueError(f"{folder} holds {len(rows)} rows, its manifest says {manifest.rows}; compute them again.")
    return rows


class StatesCollator:
    """Makes a batch of stored rows, one behind the other: `states` (N + 2, tokens, d) and `labels` (1 + tokens,).

    The first label is -100: trainers count labels from the second on, as nothing predicts the first of a row.

    Tokens whose label has been taken back, by pruning, are left out.
    """

    def __init__(self, folder: str | Path) -> None:
        self.manifest = Manifest.read(Path(folder))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch."""
        states, labels = [], []
        for row in rows:
            own = torch.as_tensor(row["labels"])[torch.as_tensor(row["state_tokens"], dtype=torch.int64)]  # (n,)
            parts = len(self.manifest.layers) + 2
            stored = FORMATS[self.manifest.format].decode(row["states"], parts, self.manifest.hidden_size)
            kept = own != IGNORE_INDEX
            states.append(stored[:, kept])
            labels.append(own[kept])
        return {"labels": torch.cat([torch.tensor([IGNORE_INDEX]), *labels]), "states": torch.cat(states, dim=1)}


def model_from_states(folder: str | Path, config: SideTuningConfig) -> Any:
    """A side-tuned model without its base: the head is loaded, every other weight of the base is empty.

    It runs no tokens. It learns from the batches of [`StatesCollator`], in any `Trainer` with
    `remove_unused_columns=False`; its adapter is like any other.

    Raises:
        ValueError: when `config` taps other blocks than were stored.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    _refuse_attention(config)
    settings = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(settings)
    base.config.name_or_path = base.name_or_path = manifest.base
    shape = find_decoder(base).shape
    if tuple(config.layers(shape)) != tuple(manifest.layers):
        raise ValueError(
            f"The side network taps blocks {[*config.layers(shape)]}, but the states are of {[*manifest.layers]}; set "
            "tap_every or layers_to_transform accordingly, or compute other states."
        )
    if _checksum(folder / HEAD) != manifest.head:
        raise ValueError(f"{folder / HEAD} is missing or damaged; compute the states again, which keeps their parts.")
    base.get_output_embeddings().load_state_dict(load_file(folder / HEAD), assign=True)
    config = copy(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    model: Any = get_peft_model(base, config)
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(0), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty(0))
    base.get_output_embeddings().requires_grad_(False)
    return model


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    if file.is_file():
        with file.open("rb") as content:
            while chunk := content.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()


def _refuse_attention(config: SideTuningConfig) -> None:
    if config.side_attention:
        raise ValueError(
            "side_attention is True, but side blocks that attend read tokens whose states are not stored; leave it out."
        )
