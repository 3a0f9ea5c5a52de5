"""Computing states: one pass of the base over a data set, by one process or several, into a folder."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import alone_with, clean_up_after_killed, replacing
from ..eu_plane.dataset import Parts, refuse_shards, score_parts
from ..eu_plane.engine import Engine, engine_of
from ..eu_plane.scorer import EUScorer
from ..processes import SharedWork
from ..side_tuning import SideTuningConfig
from ..side_tuning.peft.untrusted import tokenizer_fingerprint
from ..states.format import FORMATS
from ..states.projection import CHANNELS, PROJECTION, Projection, check_format
from .manifest import HEAD, MANIFEST, PROJECTED, Manifest, checksum_of, read_projection, refuse_attention
from .rows import load_states

# A projection is fitted to so many tokens for each channel, where there are, from so many rows at a time.
FITTED_TOKENS, FITTED_AT_ONCE = 16, 32


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
        refuse_shards([engine_of(model)], work)
        if states_format == PROJECTION:
            if work.main:
                fit_projection(dataset, model, tokenizer, config, folder, channels, **scoring)
            work.meet()
        parts = parts_of_states(model, tokenizer, config, folder, states_format, **scoring)
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
    refuse_attention(config)
    check_format(states_format)
    if states_format == PROJECTION:
        scoring |= {"projection": read_projection(folder)[0]}
    else:
        scoring |= {"states_format": states_format}
    return Parts(EUScorer(model, tokenizer, states=config, **scoring), folder)


def fit_projection(
    dataset: Dataset, model: nn.Module | Engine, tokenizer: Any, config: SideTuningConfig, folder: Path, channels: int,
    **scoring: Any,
) -> None:  # fmt: skip
    """Fit a projection to the first rows of `dataset`, unless `folder` has it already, and write it."""
    refuse_attention(config)
    scorer = EUScorer(model, tokenizer, states=config, states_format="float32", **scoring)
    fitted_to = scorer.fingerprint()
    if (folder / PROJECTED).is_file():
        found, known = read_projection(folder)
        if found.basis.shape[2] == channels and known == fitted_to:
            return
    parts, width = len(scorer.layers) + 2, scorer.engine.shape().hidden_size
    states: list[Tensor] = []
    for start in range(0, len(dataset), FITTED_AT_ONCE):
        contents = scorer(dataset[start : start + FITTED_AT_ONCE])["states"]
        states += [FORMATS["float32"].decode(content, parts, width) for content in contents]
        if sum(row.shape[1] for row in states) >= FITTED_TOKENS * channels:
            break
    projection = Projection.fit(torch.cat(states, dim=1), channels)
    with replacing(folder / PROJECTED) as unfinished:
        # One entry: safetensors writes several in any order, and the file would differ from run to run.
        save_file(projection.tensors(), unfinished, {"fingerprint": f"{projection.fingerprint()} {fitted_to}"})


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
        tokenizer_fingerprint(engine.name, None), (), checksum_of(folder / HEAD), 0,
    )  # fmt: skip


def finish(folder: Path, manifest: Manifest, files: Sequence[Path], rows: int) -> None:
    """Write the manifest: last, as a folder without it is not finished."""
    manifest = replace(manifest, parts=tuple(file.name for file in files), rows=rows)
    with replacing(folder / MANIFEST) as unfinished:
        unfinished.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
