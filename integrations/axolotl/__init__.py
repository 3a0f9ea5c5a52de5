"""Axolotl: `adapter: qst` and the blocks `qst:` and `eu_pruning:` in its stock releases, as a plugin.

    plugins:
      - qtuning_peft.integrations.axolotl.QTuningPlugin

Releases from 0.21 on find the plugin by its entry point.
"""

from .plugin import QTuningPlugin

__all__ = ["QTuningPlugin"]
