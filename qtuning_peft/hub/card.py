"""The model card of an adapter: metadata for the Hub, how to use the adapter, and how it was trained.

PEFT writes a card whenever an adapter is saved. `card.md.jinja` is our part of it, between marks; the rest is its
author's and stays, as does what it says of the training when it is saved again without `training_metadata`.
"""

import functools
import re
import warnings
from collections.abc import Iterable
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel

from ..atomic import replacing
from ..side_tuning import SideTuningConfig
from .metadata import TrainingMetadata, is_hub_name

OURS = ("<!-- qtuning-peft -->", "<!-- end of qtuning-peft -->")
MARKS = ("<!-- training metadata of qtuning-peft -->", "<!-- end of training metadata of qtuning-peft -->")
TAGS = ("qst", "side-tuning", "qtuning-peft")
LARGEST_CARD, LARGEST_METADATA = 2**22, 2**17
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
SETTINGS = sorted({f.name for f in fields(SideTuningConfig)} - {f.name for f in fields(PeftConfig)})
TEMPLATE = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False).from_string(
    files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8")
)


def complete(
    readme: Path, config: SideTuningConfig, tags: Iterable[str] = (), adapter: str = "ADAPTER",
    training: TrainingMetadata | None = None,
) -> None:  # fmt: skip
    """Add to a card, new or not, what a reader of `adapter` needs; running it again changes nothing.

    `training` replaces what the card says of the training, as far as it says something.
    """
    card, training = load_card(readme), training or TrainingMetadata()
    data, base, task = card.data, config.base_model_name_or_path or "", config.task_type or ""
    before, former, after = split(card.text, OURS)
    ours = TEMPLATE.render(
        ours=OURS, marks=MARKS, adapter=adapter, training=training, data_of=data_of, former=split(former, MARKS)[1],
        cls=f"Auto{MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, PeftModel).__name__}",
        settings=yaml.safe_dump(settings_of(config)), serve=serving_command(config),
        # Of a folder on the author's machine only the last name.
        base=base if is_hub_name(base) else Path(base).name or "its base",
        fence=max([*re.findall("`+", training.recipe or ""), "``"], key=len) + "`",
    ).strip()  # fmt: skip
    text = f"{before}{ours}{after}" if former else f"\n{ours}\n\n{before.lstrip()}"
    # The form that PEFT writes for other methods, if nobody has filled it in.
    text = text.replace(ModelCard.from_template(ModelCardData()).text.strip(), "")
    # TRL's snippet fails without our import.
    snippet = "```python\n{}from transformers import pipeline\n"
    card.text = text.replace(snippet.format(""), snippet.format("import qtuning_peft  # registers QST with PEFT\n"))

    # The Hub refuses a card whose base or data are a folder's.
    data.base_model = next((name for name in (base, *listed(data.base_model)) if is_hub_name(name)), None)
    data.base_model_relation = "adapter" if data.base_model else None
    tags = {tag for tag in (*listed(data.tags), *tags, *TAGS) if not tag.startswith("base_model:adapter:")}
    data.tags = sorted(tags | ({f"base_model:adapter:{data.base_model}"} if data.base_model else set()))
    data.library_name, data.pipeline_tag = "peft", data.pipeline_tag or PIPELINES.get(task)
    data.datasets = list(training.datasets) or [name for name in listed(data.datasets) if is_hub_name(name)] or None
    data.language = list(training.language) or data.language
    data.license = training.license or data.license
    if data.eval_results or training.results:
        data.eval_results = list(training.results) or data.eval_results
        # What the trainer calls it may be a folder.
        data.model_name = adapter.split("/")[-1]
    with replacing(readme) as unfinished:
        unfinished.write_text(str(card), encoding="utf-8")


def settings_of(config: SideTuningConfig) -> dict[str, Any]:
    """What a configuration sets beside what every PEFT configuration has."""
    return {name: value for name in SETTINGS if (value := getattr(config, name)) is not None}


def serving_command(config: SideTuningConfig) -> str | None:
    """How to serve an adapter that generates."""
    if config.task_type != "CAUSAL_LM":
        return None
    only_transformers = config.side_attention or config.modules_to_save
    return f"qtuning serve BASE{' --engine transformers' if only_transformers else ''} --adapter NAME=FOLDER"


def split(text: str, marks: tuple[str, str]) -> tuple[str, str, str]:
    """What stands before a section of a card, the section with its marks, and what stands after it."""
    before, begin, rest = text.partition(marks[0])
    section, end, after = rest.partition(marks[1])
    return (before, begin + section + end, after) if end else (text, "", "")


def data_of(result: EvalResult) -> str:
    """Which data a result was measured on."""
    return ", ".join(str(part) for part in (result.dataset_name, result.dataset_split) if part)


def load_card(readme: Path) -> Any:
    """Read a card, or make a new one; `ValueError` when it is a link, too large, or its metadata cannot be read."""
    if readme.is_symlink() or (readme.exists() and readme.stat().st_size > LARGEST_CARD):
        raise ValueError(f"{readme} is a link or larger than {LARGEST_CARD} bytes; put a card in its place.")
    if not readme.exists():
        return ModelCard("---\nlibrary_name: peft\n---\n")
    try:
        block = REGEX_YAML_BLOCK.search(readme.read_text(encoding="utf-8-sig"))
        if len(metadata := block[2] if block else "") > LARGEST_METADATA:
            raise ValueError(f"more than {LARGEST_METADATA} characters")
        # By aliases, 500 bytes become gigabytes: merge keys and huggingface_hub copy what they stand for.
        for event in yaml.parse(metadata, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"*{event.anchor} is an alias; write out what it stands for")
        return ModelCard.load(readme)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{readme} has metadata that cannot be read ({reason}); correct them.") from error


def listed(value: object) -> list[str]:
    """The strings of a field of a card's metadata, which may hold anything."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def complete_cards() -> None:
    """Have PEFT write our cards for side adapters, when it saves them and when it pushes them."""
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @functools.wraps(create)
    def create_or_update_model_card(self: PeftModel, output_dir: Any, adapter: str = "ADAPTER") -> None:
        config = self.active_peft_config
        if not isinstance(config, SideTuningConfig):
            return create(self, output_dir)
        tags, training = (getattr(self, name, None) for name in ("model_tags", "training_metadata"))
        try:
            complete(Path(output_dir, "README.md"), config, tags or (), adapter, training)
        except ValueError as error:
            # The weights are still to be saved.
            warnings.warn(f"{error} The card stays as it is.", stacklevel=2)

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # transformers has put a card of its own in the place of ours.
        if isinstance(self.active_peft_config, SideTuningConfig):
            create_or_update_model_card(self, working_dir, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    for replacement in (create_or_update_model_card, _upload_modified_files):
        setattr(PeftModel, replacement.__name__, replacement)
