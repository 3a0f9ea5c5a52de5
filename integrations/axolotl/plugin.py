"""The hooks. Each returns at once unless one of our blocks is there: Axolotl calls them in every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.logging import get_logger

# Below the name whose messages Axolotl shows.
LOG = get_logger("axolotl.qtuning")


class QTuningPlugin(BasePlugin):
    """Quantized side tuning as `adapter: qst`, and pruning of the training data as `eu_pruning:`."""

    def get_input_args(self) -> str:
        """Where the keys are that this plugin adds."""
        return "qtuning_peft.integrations.axolotl.args.QTuningArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter that this plugin loads."""
        return [AdapterCapabilities(name="qst")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Put a side network beside `model`, a new one or that of `lora_model_dir`."""
        if cfg.adapter != "qst":
            return None
        from peft import PeftModel, get_peft_model

        from ..blocks import QSTTrainingBlock

        task_type = "SEQ_CLS" if cfg.reward_model else "CAUSAL_LM"
        config = QSTTrainingBlock(**(cfg.qst or {})).peft_config(task_type)
        if config_only:
            return None, config
        # Axolotl has asked for gradients of the embeddings, which nothing here reads.
        if hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()
        if cfg.lora_model_dir:
            adapted = PeftModel.from_pretrained(model, str(cfg.lora_model_dir), is_trainable=not inference)
            config = adapted.active_peft_config
        else:
            adapted = get_peft_model(model, config)
        adapted.print_trainable_parameters()
        return adapted, config

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Make sure that the base is as small as the user thinks."""
        if cfg.adapter != "qst":
            return
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for key, loaded in (("load_in_4bit", "is_loaded_in_4bit"), ("load_in_8bit", "is_loaded_in_8bit")):
            if cfg[key] and not getattr(base, loaded, False) and not getattr(base, "is_quantized", False):
                raise RuntimeError(
                    f"{key} is true, but the base was loaded without quantization; this is a fault here."
                )
        bits = (
            "4-bit" if getattr(base, "is_loaded_in_4bit", False) else "8-bit" if cfg.load_in_8bit else str(base.dtype)
        )
        LOG.info("Side network beside a base of %.1f MiB (%s)", base.get_memory_footprint() / 2**20, bits)

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Train on the CPU where there is no GPU, also in bfloat16; score batches where the model is."""
        arguments: dict[str, Any] = {}
        if cfg.adapter == "qst":
            import torch

            if not torch.cuda.is_available():
                arguments["use_cpu"] = True
        if cfg.eu_pruning and cfg.eu_pruning.mode == "dynamic":
            arguments["dataloader_num_workers"] = 0
            arguments["dataloader_prefetch_factor"] = None
        return arguments or None

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Run the base as little as the block `qst` allows, and prune every batch, if asked to."""
        from qtuning_peft.eu_plane import EUPruningCallback
        from qtuning_peft.trainer import PrefixCachingCallback

        from ..blocks import EUPruningBlock, QSTTrainingBlock

        callbacks: list[Any] = []
        if cfg.adapter == "qst":
            callbacks += [PrefixCachingCallback(), *QSTTrainingBlock(**(cfg.qst or {})).callbacks()]
        if cfg.eu_pruning and cfg.eu_pruning.mode == "dynamic":
            block = EUPruningBlock(**cfg.eu_pruning)
            callbacks.append(EUPruningCallback(block.pruner(trainer.processing_class), block.tokens_per_batch))
        return callbacks

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Prune the training data, if asked to, and keep a side network's card at what the trainer logs."""
        logged = self._prune(cfg, trainer) if cfg.eu_pruning and cfg.eu_pruning.mode != "dynamic" else None
        if cfg.adapter != "qst":
            return
        from ..metadata import TrainingMetadataCallback, datasets_on_the_hub

        held_out = datasets_on_the_hub(cfg.test_datasets)
        trainer.add_callback(
            TrainingMetadataCallback(
                trainer.model, cfg, logged, datasets_on_the_hub(cfg.datasets),
                (held_out[0] if len(held_out) == 1 else None, None),
            )
        )  # fmt: skip

    def _prune(self, cfg: Any, trainer: Any) -> str:
        """Prune under the model that is about to train, and count its steps anew; returns what was kept."""
        from axolotl.utils.trainer import calculate_total_num_steps

        logged: list[str] = []

        def log(message: str) -> None:
            LOG.info(message)
            logged.append(message)

        trainer.train_dataset = pruned(cfg, trainer.train_dataset, trainer.model, trainer.processing_class, log)
        cfg.total_num_tokens = cfg.total_supervised_tokens = None
        steps = max(int(calculate_total_num_steps(cfg, trainer.train_dataset)), 1)
        if not cfg.max_steps:
            trainer.args.max_steps = steps
        if cfg.warmup_steps is None:
            share = cfg.warmup_ratio if cfg.warmup_ratio is not None else 0.03
            trainer.args.warmup_steps = int(share * (cfg.max_steps or steps))
        LOG.info("%d steps of pruned data", trainer.args.max_steps)
        return logged[0].removeprefix("eu_pruning ") if logged else "as eu_pruning says"


def pruned(cfg: Any, dataset: Any, model: Any, tokenizer: Any, log: Callable[[str], None] = LOG.info) -> Any:
    """The rows of `dataset`, as Axolotl has prepared it, that the block `eu_pruning` keeps."""
    from ..blocks import EUPruningBlock
    from ..pruning import prune_training_data

    return prune_training_data(
        dataset, model, tokenizer, EUPruningBlock(**cfg.eu_pruning),
        cache_path=Path(cfg.dataset_prepared_path or cfg.output_dir) / "eu_scores",
        report_path=Path(cfg.output_dir) / "eu_report.html", log=log,
    )  # fmt: skip
