"""Prints the path of the plugin, for `swift sft --external_plugins`."""

from pathlib import Path

print(Path(__file__).resolve().with_name("plugin.py"))
