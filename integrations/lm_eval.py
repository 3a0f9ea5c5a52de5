"""lm-evaluation-harness that knows QST: `python -m qtuning_peft.integrations.lm_eval`, then what `lm_eval` takes.

The harness loads an adapter with plain PEFT (`--model_args pretrained=BASE,peft=ADAPTER`), but `lm_eval` itself imports
nothing that registers QST. As a module this also runs under `accelerate launch -m`.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

import qtuning_peft  # noqa: F401  (registers QST with PEFT)
from qtuning_peft.eu_plane.files import read_data


def rows(data_file: str = "", **_: Any) -> dict[str, Dataset]:
    """The `custom_dataset` of the recipes: a file of rows, as the validation set.

    Args:
        data_file: `.jsonl`, `.json` or `.parquet`, from the command line: `--metadata data_file=rows.jsonl`.
    """
    if not data_file:
        raise ValueError("The task has no rows; add --metadata data_file=FILE.")
    return {"validation": read_data(Path(data_file))}


def main() -> None:
    """Run the harness's own command line."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise SystemExit("lm_eval is not installed; run: pip install lm_eval") from error
    cli_evaluate()


if __name__ == "__main__":
    main()
