"""lm-evaluation-harness that knows QST: `python -m qtuning_peft.integrations.lm_eval`, then what `lm_eval` takes.

The harness loads an adapter with plain PEFT (`--model_args pretrained=BASE,peft=ADAPTER`), but `lm_eval` itself imports
nothing that registers QST. As a module this also runs under `accelerate launch -m`.
"""

import qtuning_peft  # noqa: F401  (registers QST with PEFT)


def main() -> None:
    """Run the harness's own command line."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise SystemExit("lm_eval is not installed; run: pip install lm_eval") from error
    cli_evaluate()


if __name__ == "__main__":
    main()
