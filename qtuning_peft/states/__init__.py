"""Reuse of the base's work: the prompt prefix, and the hidden-state cache."""

from .memory import HiddenStateCache
from .prefix import PromptPrefix, common_prefix
from .reuse import Reuse, cache_states, may_serve, reuse_of
from .stores import FolderStore, MemoryStore, Store

__all__ = [
    "FolderStore", "HiddenStateCache", "MemoryStore", "PromptPrefix", "Reuse", "Store", "cache_states", "common_prefix",
    "may_serve", "reuse_of",
]  # fmt: skip
