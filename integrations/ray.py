"""Ray Data on a cluster: workers share the base's pass over a data set, and write the folder that one process writes.

Each worker is an actor of `map_batches` that loads the model once; scheduling, and workers that die, are Ray's. All
machines must see the folder. Finished parts are kept there: started again, the run goes on where it stopped.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from datasets import Dataset

from qtuning_peft.atomic import alone_with, clean_up_after_killed
from qtuning_peft.side_tuning import SideTuningConfig
from qtuning_peft.states.projection import CHANNELS, PROJECTION
from qtuning_peft.stored import Manifest, load_states
from qtuning_peft.stored.compute import describe, finish, fit_projection, parts_of_states


class StatesWorker:
    """Writes parts of a data set, which are the rows of the batches that it is called with.

    Args:
        load: Returns the base, or an engine that runs it, and its tokenizer.
        folder, config, states_format, scoring: As in [`compute_states`].
    """

    def __init__(
        self, load: Callable[[], tuple[Any, Any]], folder: Path, config: SideTuningConfig, states_format: str,
        scoring: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.parts = parts_of_states(*load(), config, folder, states_format, **scoring)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The parts' files, and the manifest with the first of all."""
        files, manifests = [], []
        for start, content in zip(batch["start"].tolist(), batch["rows"], strict=True):
            rows = pickle.loads(content)
            indices = range(start, start + len(next(iter(rows.values()))))
            files.append(self.parts.compute(rows, indices).name)
            manifests.append(json.dumps(asdict(describe(self.parts))) if start == 0 else "")
        return {"start": batch["start"], "file": files, "manifest": manifests}


def _fit(
    load: Callable[[], tuple[Any, Any]], dataset: Dataset, config: SideTuningConfig, folder: Path, channels: int,
    scoring: Mapping[str, Any],
) -> None:  # fmt: skip
    fit_projection(dataset, *load(), config, folder, channels, **scoring)


def compute_states(
    dataset: Dataset, load: Callable[[], tuple[Any, Any]], config: SideTuningConfig, folder: str | Path, *,
    workers: int = 1, states_format: str = "bfloat16", channels: int = CHANNELS, rows_per_part: int = 32,
    scoring: Mapping[str, Any] | None = None, **resources: Any,
) -> Dataset:  # fmt: skip
    """What [`qtuning_peft.compute_states`] does, by workers of Ray.

    Args:
        dataset, config, states_format, channels, rows_per_part: As there.
        load: Returns the base, or an engine that runs it, and its tokenizer; each worker calls it once, as in
            `functools.partial(qtuning_peft.loading.load_model, "MODEL", load_in_4bit=True)`.
        folder: Where the states go. All machines see it.
        workers: How many load the model.
        scoring: Arguments of [`EUScorer`].
        **resources: What a worker needs, as `map_batches` takes it: `num_gpus=1`.
    """
    if rows_per_part < 1:
        raise ValueError(f"rows_per_part is {rows_per_part}; choose at least 1.")
    if not len(dataset):
        raise ValueError("The data is empty; there is nothing to score.")
    folder, dataset = Path(folder).absolute(), dataset.with_format(None)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_with(folder):
        if states_format == PROJECTION:
            # By a worker of its own, as this process has no model.
            fit = ray.remote(_fit).options(**resources)
            ray.get(fit.remote(load, dataset, config, folder, channels, dict(scoring or {})))
        starts = range(0, len(dataset), rows_per_part)
        parts = [{"start": start, "rows": pickle.dumps(dataset[start : start + rows_per_part])} for start in starts]
        written = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            StatesWorker, fn_constructor_args=(load, folder, config, states_format, dict(scoring or {})),
            batch_size=1, compute=ray.data.ActorPoolStrategy(size=workers), **resources,
        ).take_all()  # fmt: skip
        written.sort(key=lambda part: part["start"])
        clean_up_after_killed(folder)
        manifest = Manifest(**json.loads(written[0]["manifest"]))
        finish(folder, manifest, [folder / part["file"] for part in written], len(dataset))
    return load_states(folder)
