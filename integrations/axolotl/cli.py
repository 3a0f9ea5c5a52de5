"""`axolotl qtuning-prune CONFIG`: score and prune ahead of training; `axolotl train` finds the scores."""

from pathlib import Path

import click


@click.command("qtuning-prune")
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path), help="Write the kept rows: .jsonl, .parquet, or a folder.")
def prune(config: str, output: Path | None) -> None:
    """Score and prune the training data of CONFIG, and write the report on it.

    CONFIG is a configuration of Axolotl with a block `eu_pruning`. Interrupted and started again, scoring goes on where
    it stopped. `axolotl train CONFIG` finds the scores, also with other ratios.
    """
    from axolotl.cli.config import load_cfg
    from axolotl.cli.utils import load_model_and_tokenizer
    from axolotl.common.datasets import load_datasets

    from qtuning_peft.eu_plane.files import check_output, write_data

    from .plugin import prune as prune_rows

    cfg = load_cfg(config)
    if not cfg.eu_pruning:
        raise click.UsageError(f"{config} has no block eu_pruning; add one, with sample_ratio.")
    if cfg.eu_pruning.mode == "dynamic":
        raise click.UsageError("eu_pruning.mode is 'dynamic', which prunes while training; set it to static.")
    if output is not None:
        check_output(output)
    data = load_datasets(cfg=cfg).train_dataset
    kept, _ = prune_rows(cfg, data, *load_model_and_tokenizer(cfg=cfg)[:2])
    if output is not None:
        write_data(kept, output)
    click.echo(f"{len(kept)} of {len(data)} rows are kept" + (f": {output}" if output is not None else "."))
