"""The model card of an adapter: metadata that the Hub reads, and how to use it, the needed import first.

PEFT writes a card whenever an adapter is saved. Ours adds to it, between two marks; whatever else stands in the card
is its author's and stays. Pushing needs a word more: transformers makes a card of its own before PEFT saves, and puts
it in the place of PEFT's afterwards.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from .atomic import replacing
from .side_tuning import SideTuningConfig

BEGIN, END = "<!-- qtuning-peft -->", "<!-- end of qtuning-peft -->"
TAGS = ("qst", "side-tuning", "qtuning-peft")
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
CLASSES = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_CLS": "AutoPeftModelForSequenceClassification"}
# What an adapter says about its base and its files rather than about itself.
NOT_SETTINGS = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "peft_type", "auto_mapping"}

SECTION = """{begin}
## How to use it

This is a side network for `{base}`: Quantized Side Tuning (QST, ACL 2024), a method that
[PEFT](https://huggingface.co/docs/peft) knows once `qtuning_peft` is imported.

```python
import qtuning_peft  # registers QST with PEFT; before anything else
from peft import {cls}

model = {cls}.from_pretrained("{adapter}")
```

The base is loaded as it was saved; pass `quantization_config` to have it in 4 bits. The adapter cannot be merged: it
runs beside the base.

## How it was made

```yaml
{settings}```
{end}"""


def complete(readme: Path, config: SideTuningConfig, tags: Iterable[str] = (), adapter: str = "ADAPTER") -> None:
    """Add to a model card what a reader of this adapter needs; running it again changes nothing.

    Args:
        readme: The card; made if it does not exist.
        config: The adapter's configuration.
        tags: Tags to add beside ours.
        adapter: What the adapter is loaded by.
    """
    card = ModelCard.load(readme) if readme.is_file() else ModelCard.from_template(ModelCardData())
    task = str(getattr(config.task_type, "value", config.task_type) or "")
    card.data.library_name = "peft"
    card.data.tags = sorted({*(card.data.tags or []), *tags, *TAGS})
    if config.base_model_name_or_path:
        card.data.base_model = config.base_model_name_or_path
        card.data.base_model_relation = "adapter"
    if not card.data.pipeline_tag and task in PIPELINES:
        card.data.pipeline_tag = PIPELINES[task]

    settings = {
        name: getattr(value, "value", value)
        for name, value in sorted(config.to_dict().items())
        if name not in NOT_SETTINGS
    }
    section = SECTION.format(
        begin=BEGIN, end=END, base=config.base_model_name_or_path or "its base", adapter=adapter,
        cls=CLASSES.get(task, "AutoPeftModel"),
        settings=yaml.safe_dump({k: v for k, v in settings.items() if v is not None}),
    )  # fmt: skip
    before, found, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2] if found else ""
    # First of all in a new card; later wherever its author has moved it.
    card.text = before + section + after if found else f"\n{section}\n\n{before.lstrip()}"
    with replacing(readme) as unfinished:
        unfinished.write_text(str(card), encoding="utf-8")


def complete_cards() -> None:
    """Have PEFT complete the cards of side adapters, when it saves them and when it pushes them."""
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @functools.wraps(create)
    def create_or_update_model_card(self: PeftModel, output_dir: str | os.PathLike[str]) -> None:
        config = self.active_peft_config
        readme = Path(output_dir) / "README.md"
        # PEFT replaces them by its own.
        tags = ModelCard.load(readme).data.tags if readme.is_file() else None
        create(self, os.fspath(output_dir))
        if isinstance(config, SideTuningConfig):
            complete(readme, config, tags or ())

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        config = self.active_peft_config
        if isinstance(config, SideTuningConfig):
            self.create_or_update_model_card(working_dir)
            complete(Path(working_dir) / "README.md", config, adapter=repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    for replacement in (create_or_update_model_card, _upload_modified_files):
        setattr(PeftModel, replacement.__name__, replacement)
