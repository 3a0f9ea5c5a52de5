"""The model card of an adapter: metadata that the Hub reads, how to use it, and how it was trained.

PEFT writes a card whenever an adapter is saved. Ours adds two sections to it, each between marks of its own; whatever
else stands in the card is its author's and stays. How the adapter was trained is known to whoever trains it, who says
so in `model.training_metadata`; in a card it stays when that is written again by someone who does not know.

Pushing needs a word more: transformers makes a card of its own before PEFT saves, and puts it in the place of PEFT's
afterwards.
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

from ..atomic import replacing
from ..side_tuning import SideTuningConfig
from . import metadata
from .metadata import TrainingMetadata, is_hub_name

BEGIN, END = "<!-- qtuning-peft -->", "<!-- end of qtuning-peft -->"
TAGS = ("qst", "side-tuning", "qtuning-peft")
LARGEST_CARD = 2**22
# Followed by the base's name, in a tag of PEFT's.
BASE_TAG = "base_model:adapter:"
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

The base is loaded as it was saved; pass `quantization_config` to have it in 4 bits.

## Limits

- It was trained beside `{base}`, and is of no use beside another model.
- It cannot be merged: it runs beside the base, so generation is slower than with the base alone.
- It loads only where `qtuning_peft` is installed and imported.

## Configuration

```yaml
{settings}```
{end}"""
# A snippet in TRL's cards, which fails without our import.
PIPELINE = "```python\nfrom transformers import pipeline\n"
PIPELINE_WITH_IMPORT = PIPELINE.replace("from", "import qtuning_peft  # registers QST with PEFT\nfrom")


def complete(
    readme: Path,
    config: SideTuningConfig,
    tags: Iterable[str] = (),
    adapter: str = "ADAPTER",
    facts: TrainingMetadata | None = None,
) -> None:
    """Add to a model card what a reader of this adapter needs; running it again changes nothing.

    Args:
        readme: The card; made if it does not exist.
        config: The adapter's configuration.
        tags: Tags to add beside ours.
        adapter: What the adapter is loaded by.
        facts: How it was trained, in the place of what the card says of it; without them that stays, also where they
            are nothing but metadata.
    """
    card = load_card(readme) if readme.is_file() else ModelCard.from_template(ModelCardData())
    task = str(getattr(config.task_type, "value", config.task_type) or "")
    base = config.base_model_name_or_path
    _describe(card.data, base, task, {*_listed(card.data.tags), *tags, *TAGS})
    settings = {
        name: getattr(value, "value", value)
        for name, value in sorted(config.to_dict().items())
        if name not in NOT_SETTINGS
    }
    section = SECTION.format(
        begin=BEGIN, end=END, adapter=adapter, cls=CLASSES.get(task, "AutoPeftModel"),
        # A folder of the author's machine is nobody else's business, and its last name says as much.
        base=(base if is_hub_name(base) else Path(base).name) if base else "its base",
        settings=yaml.safe_dump({k: v for k, v in settings.items() if v is not None}),
    )  # fmt: skip
    before, former, after = _parts(card.text, BEGIN, END)
    # First of all in a new card; later wherever its author has moved it.
    text = before + section + after if former else f"\n{section}\n\n{before.lstrip()}"
    if facts is not None:
        before, former, after = _parts(text, metadata.BEGIN, metadata.END)
        told = facts.section()
        _describe_training(card.data, facts, former if told else "")
        if told and former:
            text = before + told + after
        elif told:
            text = text.replace(END, f"{END}\n\n{told}", 1)
    if card.data.eval_results:
        # Axolotl names a model by the folder it writes to.
        name = card.data.model_name
        card.data.model_name = (adapter if name in (None, "ADAPTER") else str(name)).split("/")[-1]
    card.text = text.replace(PIPELINE, PIPELINE_WITH_IMPORT)
    with replacing(readme) as unfinished:
        unfinished.write_text(str(card), encoding="utf-8")


def load_card(readme: Path) -> Any:
    """Read a card.

    Raises:
        ValueError: when it is larger than any card, or its metadata cannot be read.
    """
    if readme.stat().st_size > LARGEST_CARD:
        raise ValueError(f"{readme} is larger than {LARGEST_CARD} bytes, and no card that is read here.")
    try:
        return ModelCard.load(readme)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{readme} has metadata that cannot be read ({reason}); correct what is between ---."
        ) from error


def _parts(text: str, begin: str, end: str) -> tuple[str, str, str]:
    """What stands before a section, the section, and what stands after it."""
    # Not a regular expression, which would look for the end once for every beginning.
    start = text.find(begin)
    stop = text.find(end, start) + len(end)
    return (text[:start], text[start:stop], text[stop:]) if start >= 0 and stop >= len(end) else (text, "", "")


def _describe(data: Any, base: str | None, task: str, tags: set[str]) -> None:
    data.library_name = "peft"
    # The Hub refuses a card whose base or data are a folder's.
    data.tags = sorted(tag for tag in tags if not tag.startswith(BASE_TAG) or is_hub_name(tag.removeprefix(BASE_TAG)))
    if base and is_hub_name(base):
        data.base_model = base
    elif not all(is_hub_name(name) for name in _listed(data.base_model)):
        data.base_model = None
    data.base_model_relation = "adapter" if data.base_model else None
    data.datasets = [name for name in _listed(data.datasets) if is_hub_name(name)] or None
    if not data.pipeline_tag and task in PIPELINES:
        data.pipeline_tag = PIPELINES[task]


def _describe_training(data: Any, facts: TrainingMetadata, former: str) -> None:
    """Put the metadata among `facts` in the place of those that the section `former` was written with."""
    datasets = [name for name in _listed(data.datasets) if f"`{name}`" not in former]
    data.datasets = list(dict.fromkeys([*datasets, *facts.datasets])) or None
    data.language = list(dict.fromkeys([*_listed(data.language), *facts.language])) or None
    data.license = facts.license or data.license
    results = [
        result
        for result in data.eval_results or []
        if metadata.row(metadata.cells_of(result)) not in former
        and not any(result.is_equal_except_value(new) for new in facts.results)
    ]
    data.eval_results = [*results, *facts.results] or None


def _listed(value: object) -> list[str]:
    # A card may hold anything.
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def complete_cards() -> None:
    """Have PEFT complete the cards of side adapters, when it saves them and when it pushes them."""
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    def write(model: PeftModel, folder: str | os.PathLike[str], **adapter: str) -> None:
        config = model.active_peft_config
        readme = Path(folder) / "README.md"
        # PEFT replaces them by its own.
        tags = _listed(load_card(readme).data.tags) if readme.is_file() else ()
        create(model, os.fspath(folder))
        if isinstance(config, SideTuningConfig):
            complete(readme, config, tags, facts=getattr(model, "training_metadata", None), **adapter)

    @functools.wraps(create)
    def create_or_update_model_card(self: PeftModel, output_dir: str | os.PathLike[str]) -> None:
        write(self, output_dir)

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.active_peft_config, SideTuningConfig):
            write(self, working_dir, adapter=repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    for replacement in (create_or_update_model_card, _upload_modified_files):
        setattr(PeftModel, replacement.__name__, replacement)
