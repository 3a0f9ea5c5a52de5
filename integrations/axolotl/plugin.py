"""The hooks. Each returns at once unless one of our blocks is there: Axolotl calls them in every run."""

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

        config = QSTTrainingBlock(**(cfg.qst or {})).peft_config("SEQ_CLS" if cfg.reward_model else "CAUSAL_LM")
        if config_only:
            return None, config
        # Axolotl has asked for gradients of the embeddings, which nothing here reads.
        if hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()
        if cfg.lora_model_dir:
            adapted = PeftModel.from_pretrained(model, str(cfg.lora_model_dir), is_trainable=not inference)
        else:
            adapted = get_peft_model(model, config)
        adapted.print_trainable_parameters()
        return adapted, adapted.active_peft_config

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Check that the base is as small as the user thinks."""
        if cfg.adapter != "qst":
            return
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        loaded = next((bits for bits in ("4bit", "8bit") if getattr(base, f"is_loaded_in_{bits}", False)), None)
        for bits in ("4bit", "8bit"):
            if cfg[f"load_in_{bits}"] and loaded != bits and not getattr(base, "is_quantized", False):
                raise RuntimeError(f"load_in_{bits} is true, but the base is not quantized; this is a fault here.")
        size = base.get_memory_footprint() / 2**20
        LOG.info("Side network beside a base of %.1f MiB (%s)", size, f"{loaded[0]}-bit" if loaded else base.dtype)

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """Train on the CPU where there is no GPU, also in bfloat16."""
        import torch

        return {"use_cpu": True} if cfg.adapter == "qst" and not torch.cuda.is_available() else None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Prune the training data, if asked to, and add what the blocks ask of the trainer."""
        if cfg.adapter != "qst" and not cfg.eu_pruning:
            return
        from ..blocks import EUPruningBlock, QSTTrainingBlock
        from ..common import add_callbacks

        eu_pruning = EUPruningBlock(**cfg.eu_pruning) if cfg.eu_pruning else None
        pruned = None
        if eu_pruning is not None and eu_pruning.mode == "static":
            trainer.train_dataset, pruned = prune(cfg, trainer.train_dataset, trainer.model, trainer.processing_class)
            _count_steps(cfg, trainer)
        add_callbacks(trainer, trainer.processing_class, cfg, eu_pruning, pruned, LOG.warning)
        if cfg.adapter == "qst":
            for callback in QSTTrainingBlock(**(cfg.qst or {})).callbacks():
                trainer.add_callback(callback)


def _count_steps(cfg: Any, trainer: Any) -> None:
    """Steps and warm-up of the pruned data; Axolotl has counted those of all rows."""
    from axolotl.utils.trainer import calculate_total_num_steps

    cfg.total_num_tokens = cfg.total_supervised_tokens = None
    steps = max(int(calculate_total_num_steps(cfg, trainer.train_dataset)), 1)
    if not cfg.max_steps:
        trainer.args.max_steps = steps
    if cfg.warmup_steps is None:
        share = cfg.warmup_ratio if cfg.warmup_ratio is not None else 0.03
        trainer.args.warmup_steps = int(share * (cfg.max_steps or steps))
    LOG.info("%d steps of pruned data", trainer.args.max_steps)


def prune(cfg: Any, dataset: Any, model: Any, tokenizer: Any) -> tuple[Any, str | None]:
    """The rows of `dataset`, as Axolotl has prepared it, that the block `eu_pruning` keeps; and that in words."""
    from ..blocks import EUPruningBlock
    from ..common import prune_before_training

    return prune_before_training(
        dataset, model, tokenizer, EUPruningBlock(**cfg.eu_pruning), Path(cfg.output_dir), LOG.info,
        scores_dir=Path(cfg.dataset_prepared_path) if cfg.dataset_prepared_path else None,
    )  # fmt: skip
