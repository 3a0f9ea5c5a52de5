"""Side networks in vLLM: many adapters on one base, and the base's states and scores.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). From then on every text model
of vLLM's has two more names: SideTuned..., which serves adapters (see `models`, `adapters`), and States..., which
returns what the base computes (see `states`, `engine`). Nothing changes for a model under its own name.

What vLLM does for LoRA it does for side networks too: an adapter's name is a model's name in requests, adapters are
loaded and unloaded while the server runs, and every request in a batch has its own. So an adapter is given as vLLM's
`LoRARequest`, and the engine starts with `enable_lora`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

SERVING, STATES = "SideTuned", "States"
# Adapters in one batch at most, unless more are named at the start; a place that is not used costs nothing.
MOST_ADAPTERS = 32


def register() -> None:
    """Make the models known to vLLM; calling it again changes nothing."""
    from vllm import ModelRegistry

    from .hooks import attach

    attach()
    for name in [*ModelRegistry.get_supported_archs()]:
        if not name.startswith((SERVING, STATES)):
            for kind in (SERVING, STATES):
                # As a string: vLLM imports a model where it runs, and nowhere else.
                ModelRegistry.register_model(f"{kind}{name}", f"{__name__}.models:{kind}{name}")


def engine_options(base: str, adapters: Mapping[str, str | Path], layers: Collection[int] = ()) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that serve side networks beside `base`; the adapters are checked.

        llm = LLM(**engine_options(base, {"pirate": "adapters/pirate"}))
        llm.generate(prompt, lora_request=LoRARequest("pirate", 1, "adapters/pirate"))

    Args:
        base: A folder, or a name on the Hub.
        adapters: Folders by name.
        layers: Further blocks that are tapped, for adapters that are loaded later; by default those of the default
            settings, if there are no adapters.

    Raises:
        ValueError: when vLLM's model cannot be followed, or an adapter is damaged or belongs to another base.
    """
    from transformers import AutoConfig

    from qtuning_peft.side_tuning import SideTuningConfig

    from .adapters import decoder_of, load_network
    from .models import refuse_unknown

    config = AutoConfig.from_pretrained(base)
    refuse_unknown(architecture := (config.architectures or ["a model without a name"])[0])
    decoder = decoder_of(config)
    tapped = {index for folder in adapters.values() for index in load_network(folder, decoder, base).layers}
    tapped = {*tapped, *layers} or {*SideTuningConfig().layers(decoder.shape)}
    return {
        "model": base,
        "enable_lora": True,
        "max_loras": max(len(adapters), MOST_ADAPTERS),
        "hf_overrides": {"architectures": [f"{SERVING}{architecture}"], "qst_layers": sorted(tapped)},
    }
