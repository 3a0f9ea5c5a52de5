"""The base's pass as data: scores and hidden states of every row, computed once; from then on training needs no base.

    h = mix(f_N, g_N)         f_N and the taps of g are read from disk;  the head alone is in memory

The base never changes (QST, ACL 2024, section 3), so what it computes for a row is a fact about the row. A folder of
states holds the parts that scoring writes (see `eu_plane.dataset`), the head, the base's configuration, and a manifest
that says what they were made with.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset, concatenate_datasets
from peft import get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from .atomic import alone_with, clean_up_after_killed, replacing
from .eu_plane.dataset import Parts, refuse_shards, require_part, score_parts
from .eu_plane.engine import Engine
from .eu_plane.fingerprint import weights_of
from .eu_plane.pruner import EUPruner
from .eu_plane.scorer import EUScorer
from .processes import SharedWork
from .reading import IGNORE_INDEX
from .side_tuning import SideTuningConfig
from .side_tuning.follow import find_decoder
from .side_tuning.peft.untrusted import tokenizer_fingerprint
from .states.format import FORMATS
from .states.projection import CHANNELS, PROJECTION, Projection, check_format, format_of
from .states.stores import key_of
from .view import VIEW, read_view, view_rows, write_view

MANIFEST, HEAD, PROJECTED = "states.json", "head.safetensors", "projection.safetensors"
# A projection is fitted to so many tokens for each channel, where there are, from so many rows at a time.
FITTED_TOKENS, FITTED_AT_ONCE = 16, 32
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


def compute_states(
    dataset: Dataset, model: nn.Module | Engine, tokenizer: Any, config: SideTuningConfig, folder: str | Path, *,
    states_format: str = "bfloat16", channels: int = CHANNELS, rows_per_part: int = 32, progress: bool = True,
    **scoring: Any,
) -> Dataset:  # fmt: skip
    """Score a data set and store the states that a side network of `config` would read, in one pass of the base.

    Killed and started again, it computes only what is not there. The processes of a process group (`accelerate launch`)
    share the work: all of them call it, with the same arguments, each with the model whole, and a folder they all see.

    Args:
        dataset, model, tokenizer: As in [`score`]; the model is the base alone, or another [`Engine`].
        config: Whose blocks are tapped: `tap_every` or `layers_to_transform`.
        folder: Where the states go.
        states_format: bfloat16, float16, float32, int8 or projection.
        channels: Of each tap, for `projection`, which is fitted to the first rows.
        rows_per_part: Rows in a file.
        progress: Show a progress bar, in the first process.
        **scoring: Of [`EUScorer`].

    Returns:
        The rows as [`load_states`] reads them.
    """
    if rows_per_part < 1:
        raise ValueError(f"rows_per_part is {rows_per_part}; choose at least 1.")
    folder = Path(folder)
    dataset = dataset.with_format(None)
    folder.mkdir(parents=True, exist_ok=True)
    with SharedWork() as work, alone_with(folder) if work.main else nullcontext():
        if states_format == PROJECTION:
            if work.main:
                fit_projection(dataset, model, tokenizer, config, folder, channels, **scoring)
            work.meet()
        parts = parts_of_states(model, tokenizer, config, folder, states_format, **scoring)
        refuse_shards(parts.scorer, work)
        if work.main:
            clean_up_after_killed(folder)
            manifest = describe(parts)
        files = score_parts(dataset, parts, rows_per_part, progress, work)
        if work.main:
            finish(folder, manifest, files, len(dataset))
    return load_states(folder)


def parts_of_states(
    model: nn.Module | Engine, tokenizer: Any, config: SideTuningConfig, folder: Path, states_format: str,
    **scoring: Any,
) -> Parts:  # fmt: skip
    """Parts with the states that a side network of `config` would read, to be computed."""
    _refuse_attention(config)
    check_format(states_format)
    if states_format == PROJECTION:
        scoring |= {"projection": read_projection(folder)}
    else:
        scoring |= {"states_format": states_format}
    return Parts(EUScorer(model, tokenizer, states=config, **scoring), folder)


def fit_projection(
    dataset: Dataset, model: nn.Module | Engine, tokenizer: Any, config: SideTuningConfig, folder: Path, channels: int,
    **scoring: Any,
) -> None:  # fmt: skip
    """Fit a projection to the first rows of `dataset`, unless `folder` has one of as many channels, and write it."""
    if (folder / PROJECTED).is_file() and read_projection(folder).basis.shape[2] == channels:
        return
    _refuse_attention(config)
    scorer = EUScorer(model, tokenizer, states=config, states_format="float32", **scoring)
    parts, width = len(scorer.layers) + 2, scorer.engine.shape().hidden_size
    found: list[Tensor] = []
    for start in range(0, len(dataset), FITTED_AT_ONCE):
        contents = scorer(dataset[start : start + FITTED_AT_ONCE])["states"]
        found += [FORMATS["float32"].decode(content, parts, width) for content in contents]
        if sum(states.shape[1] for states in found) >= FITTED_TOKENS * channels:
            break
    projection = Projection.fit(torch.cat(found, dim=1), channels)
    with replacing(folder / PROJECTED) as unfinished:
        save_file(projection.tensors(), unfinished, {"fingerprint": projection.fingerprint()})


def read_projection(folder: Path) -> Projection:
    """The projection in `folder`; a `ValueError` when it is missing or damaged."""
    try:
        with safe_open(folder / PROJECTED, "pt") as file:
            projection = Projection.of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            if (file.metadata() or {}).get("fingerprint") == projection.fingerprint():
                return projection
    except (OSError, SafetensorError, LookupError, TypeError):
        pass
    raise ValueError(f"{folder / PROJECTED} is missing or damaged; compute the states again in another folder.")


def describe(parts: Parts) -> Manifest:
    """The manifest of `parts`, still without rows; the base's head and configuration are written."""
    engine, scorer, folder = parts.scorer.engine, parts.scorer, parts.folder
    shape = engine.shape()
    with replacing(folder / HEAD) as unfinished:
        save_file(engine.head(), unfinished)
    settings = engine.config.to_dict()
    settings.pop("quantization_config", None)
    with replacing(folder / "config.json") as unfinished:
        unfinished.write_text(json.dumps(settings, indent=1, default=str), encoding="utf-8")
    return Manifest(
        engine.name, scorer.layers, shape.num_layers, shape.hidden_size,
        scorer.states_format if scorer.projection is None else PROJECTION, parts.fingerprint, engine.weights(),
        tokenizer_fingerprint(engine.name, None), (), _checksum(folder / HEAD), 0,
    )  # fmt: skip


def finish(folder: Path, manifest: Manifest, files: Sequence[Path], rows: int) -> None:
    """Write the manifest: last, as a folder without it is not finished."""
    manifest = replace(manifest, parts=tuple(file.name for file in files), rows=rows)
    with replacing(folder / MANIFEST) as unfinished:
        unfinished.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")


def load_states(folder: str | Path) -> Dataset:
    """The rows of a folder of states, or of a view of one, mapped from its files.

    Raises:
        ValueError: when a file is missing or damaged.
    """
    if (states := states_of(folder)) != Path(folder):
        return view_rows(Path(folder), load_states(states))
    folder = states
    manifest = Manifest.read(folder)
    files = [folder / name for name in manifest.parts]
    for file in files:
        require_part(file)
    rows = concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    if len(rows) != manifest.rows:
        raise ValueError(f"{folder} holds {len(rows)} rows, its manifest says {manifest.rows}; compute them again.")
    return rows


def states_of(folder: str | Path) -> Path:
    """The folder that holds the states of `folder`: itself, or the one that it is a view of."""
    folder = Path(folder)
    if not (folder / VIEW).is_file():
        return folder
    states, checksum = read_view(folder)
    if _checksum(states / MANIFEST) != checksum:
        raise ValueError(f"{folder} is a view of {states}, which is missing or has changed; prune the states again.")
    return states


def prune_states(folder: str | Path, pruner: EUPruner, output: str | Path) -> Dataset:
    """Prune stored states: `output` becomes a view of the rows and tokens that are kept, without a copy of the states.

    Args:
        folder: Of states.
        pruner: What to keep. It is fitted here.
        output: The folder to make.

    Returns:
        Its rows, as [`load_states`] reads them.
    """
    folder, rows = Path(folder), load_states(folder)
    if states_of(folder) != folder:
        raise ValueError(f"{folder} is pruned already; prune {states_of(folder)} with other settings.")
    write_view(rows, pruner, folder, _checksum(folder / MANIFEST), Path(output))
    return load_states(output)


class StoredRows:
    """The rows of a folder of states, for the hidden-state cache of a model that trains on the same rows.

    See `states.stores`. It is read alone: rows that the folder does not hold are computed in every epoch.

    Args:
        folder: Of states, or a view of one.
        base: The model that they must be of.

    Raises:
        ValueError: when they are of another base, or `layers` are not the stored blocks.
    """

    used = 0

    def __init__(self, folder: str | Path, base: nn.Module, layers: Sequence[int]) -> None:
        self.collator, self.rows = StatesCollator(folder), load_states(folder)
        manifest = self.collator.manifest
        if manifest.weights and manifest.weights != weights_of(base):
            raise ValueError(f"The states in {folder} are of {manifest.base}, whose weights are not this base's.")
        if sorted(layers) != sorted(manifest.layers):
            raise ValueError(f"The states in {folder} are of blocks {[*manifest.layers]}, not of {sorted(layers)}.")
        self.places: dict[bytes, int] = {}
        for place, row in enumerate(self.rows.remove_columns("states")):
            read = np.asarray(row["state_tokens"], np.int64) - 1
            self.places[key_of(np.asarray(row["input_ids"], np.int64), read)] = place

    def get(self, key: bytes) -> Tensor | None:
        """The states (N + 2, n, d) of a row."""
        place = self.places.get(key)
        if place is None:
            return None
        manifest = self.collator.manifest
        return self.collator.format.decode(self.rows[place]["states"], len(manifest.layers) + 2, manifest.hidden_size)

    def add(self, key: bytes, states: Tensor) -> None:
        """Nothing: the folder is finished."""


class StatesCollator:
    """Makes a batch of stored rows, one behind the other.

    It has `states` (N + 2, tokens, d) of the N blocks `state_layers` (N,), `labels` (1 + tokens,), and `row_tokens`
    (rows,), how many are of each row. The first label is -100: trainers count labels from the second on, as nothing
    predicts the first of a row.

    Tokens whose label has been taken back, by pruning, are left out.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = states_of(folder)
        self.manifest = Manifest.read(folder)
        projection = read_projection(folder) if self.manifest.format == PROJECTION else None
        self.format = format_of(self.manifest.format, projection)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch."""
        states, labels = [], []
        for row in rows:
            own = torch.as_tensor(row["labels"])[torch.as_tensor(row["state_tokens"], dtype=torch.int64)]  # (n,)
            parts = len(self.manifest.layers) + 2
            stored = self.format.decode(row["states"], parts, self.manifest.hidden_size)
            kept = own != IGNORE_INDEX
            states.append(stored if kept.all() else stored[:, kept])
            labels.append(own[kept])
        return {
            "labels": torch.cat([torch.tensor([IGNORE_INDEX]), *labels]), "states": torch.cat(states, dim=1),
            "row_tokens": torch.tensor([len(row) for row in labels]),
            "state_layers": torch.tensor(self.manifest.layers, dtype=torch.int64),
        }  # fmt: skip


def model_from_states(folder: str | Path, config: SideTuningConfig | Mapping[str, SideTuningConfig]) -> Any:
    """A side-tuned model without its base: the head is loaded, every other weight of the base is empty.

    It has one adapter of `config`, or several, of configurations by their names; they must read what was stored. It
    runs no tokens. It learns from the batches of [`StatesCollator`], in any `Trainer` with
    `remove_unused_columns=False`; its adapter is like any other.

    Raises:
        ValueError: when a side network taps other blocks than were stored.
    """
    folder = states_of(folder)
    manifest = Manifest.read(folder)
    configs = dict(config) if isinstance(config, Mapping) else {"default": config}
    settings = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(settings)
    base.config.name_or_path = base.name_or_path = manifest.base
    shape = find_decoder(base).shape
    for each in configs.values():
        _refuse_attention(each)
        if not {*each.layers(shape)} <= {*manifest.layers}:
            raise ValueError(
                f"The side network taps blocks {each.layers(shape)}, but the states are of {[*manifest.layers]}; set "
                "tap_every or layers_to_transform accordingly, or compute other states."
            )
    if _checksum(folder / HEAD) != manifest.head:
        raise ValueError(f"{folder / HEAD} is missing or damaged; compute the states again, which keeps their parts.")
    base.get_output_embeddings().load_state_dict(load_file(folder / HEAD), assign=True)
    model: Any = None
    for name, each in configs.items():
        own = copy(each)
        own.task_type = own.task_type or "CAUSAL_LM"
        if model is None:
            model = get_peft_model(base, own, adapter_name=name)
        else:
            model.add_adapter(name, own)
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
