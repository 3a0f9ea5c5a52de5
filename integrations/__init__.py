"""Where `qtuning_peft` meets trainers that need more than a `peft_config`; thin, and without mathematics.

`transformers.Trainer` and TRL need nothing from here: they take a `SideTuningConfig` as it is.
"""
