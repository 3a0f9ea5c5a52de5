"""The model card of an adapter: metadata for the Hub, how to use the adapter, and how it was trained.

PEFT writes a card whenever an adapter is saved. `card.md.jinja` has the two sections added to it, each between marks;
the rest is its author's and stays, as does the section on training when saved again without `training_metadata`.
"""

import functools
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from peft import PeftConfig, PeftModel

from ..atomic import replacing
from ..side_tuning import SideTuningConfig
from .metadata import MARKS, TrainingMetadata, cells_of, is_hub_name, row, split

USE = ("<!-- qtuning-peft -->", "<!-- end of qtuning-peft -->")
TAGS = ("qst", "side-tuning", "qtuning-peft")
BASE_TAG = "base_model:adapter:"  # of PEFT, followed by the base's name
LARGEST_CARD, LARGEST_METADATA = 2**22, 2**17
# Pipeline on the Hub, and the class that loads it.
DEFAULT = (None, "AutoPeftModel")
TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoPeftModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoPeftModelForTokenClassification"),
}
SETTINGS = sorted({f.name for f in fields(SideTuningConfig)} - {f.name for f in fields(PeftConfig)})
TEMPLATE = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False).from_string(
    files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8")
)


def complete(
    readme: Path, config: SideTuningConfig, tags: Iterable[str] = (), adapter: str = "ADAPTER",
    training: TrainingMetadata | None = None,
) -> None:  # fmt: skip
    """Add to a card, new or not, what a reader needs; running it again changes nothing.

    Args:
        readme: The card.
        config: The adapter's configuration.
        tags: Tags to add beside ours.
        adapter: What the adapter is loaded by.
        training: Replaces what the card says of the training, where this has something to show.
    """
    card, training = load_card(readme), training or TrainingMetadata()
    base = config.base_model_name_or_path
    rendered = TEMPLATE.render(
        use=USE, marks=MARKS, adapter=adapter, training=training, row=row, cells_of=cells_of,
        cls=TASKS.get(config.task_type or "", DEFAULT)[1],
        # Of a folder on the author's machine only the last name.
        base=(base if is_hub_name(base) else Path(base).name) if base else "its base",
        settings=yaml.safe_dump(settings_of(config)),
        fence=max([*re.findall("`+", training.recipe or ""), "``"], key=len) + "`",
    )  # fmt: skip
    use, section = split(rendered, USE)[1], split(rendered, MARKS)[1]
    former = split(card.text, MARKS)[1] if section else ""
    _describe(card.data, config, {*listed(card.data.tags), *tags, *TAGS}, training, former)
    if card.data.eval_results:
        # Axolotl names a model by the folder it writes to.
        name = card.data.model_name
        card.data.model_name = (adapter if name in (None, "ADAPTER") else str(name)).split("/")[-1]
    text = _put(section, MARKS, _put(use, USE, card.text), behind=USE[1])
    # TRL's snippet fails without our import.
    snippet = "```python\n{}from transformers import pipeline\n"
    card.text = text.replace(snippet.format(""), snippet.format("import qtuning_peft  # registers QST with PEFT\n"))
    with replacing(readme) as unfinished:
        unfinished.write_text(str(card), encoding="utf-8")


def settings_of(config: SideTuningConfig) -> dict[str, Any]:
    """What a configuration sets beside what every PEFT configuration has."""
    return {name: value for name in SETTINGS if (value := getattr(config, name)) is not None}


def _put(section: str, marks: tuple[str, str], text: str, behind: str = "") -> str:
    """Put a section in the place of the former one, or if there is none, first or `behind` another."""
    before, former, after = split(text, marks)
    if former or not section:
        return before + (section or former) + after
    return text.replace(behind, f"{behind}\n\n{section}", 1) if behind else f"\n{section}\n\n{text.lstrip()}"


def _describe(data: Any, config: SideTuningConfig, tags: set[str], training: TrainingMetadata, former: str) -> None:
    """Put in the metadata what the Hub needs, and `training` in the place of what the section `former` came from.

    The Hub refuses a card whose base or data are a folder's.
    """
    data.library_name = "peft"
    data.pipeline_tag = data.pipeline_tag or TASKS.get(config.task_type or "", DEFAULT)[0]
    data.tags = sorted(tag for tag in tags if not tag.startswith(BASE_TAG) or is_hub_name(tag.removeprefix(BASE_TAG)))
    names = [name for name in (config.base_model_name_or_path, *listed(data.base_model)) if name and is_hub_name(name)]
    data.base_model = names[0] if names else None
    data.base_model_relation = "adapter" if data.base_model else None
    datasets = [name for name in listed(data.datasets) if is_hub_name(name) and f"`{name}`" not in former]
    data.datasets = list(dict.fromkeys([*datasets, *training.datasets])) or None
    if training.language:
        data.language = list(dict.fromkeys([*listed(data.language), *training.language]))
    data.license = training.license or data.license
    results = [
        result
        for result in data.eval_results or []
        if row(cells_of(result)) not in former and not any(map(result.is_equal_except_value, training.results))
    ]
    data.eval_results = [*results, *training.results] or None


class _Loader(yaml.SafeLoader):
    """Refuses aliases, by which 500 bytes become gigabytes: merge keys and huggingface_hub copy what they stand for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias; write out what it stands for")
        return super().compose_node(parent, index)


def load_card(readme: Path) -> Any:
    """Read a card, or make a new one; `ValueError` when it is a link, too large, or its metadata cannot be read."""
    if readme.is_symlink():
        raise ValueError(f"{readme} is a link, and what it points to is not read or changed; put a file in its place.")
    if not readme.exists():
        return ModelCard("---\nlibrary_name: peft\n---\n")
    if readme.stat().st_size > LARGEST_CARD:
        raise ValueError(f"{readme} is larger than {LARGEST_CARD} bytes, and is not read as a card.")
    try:
        block = REGEX_YAML_BLOCK.search(readme.read_text(encoding="utf-8-sig"))
        if block and len(block[2]) > LARGEST_METADATA:
            raise ValueError(f"more than {LARGEST_METADATA} characters")
        yaml.load(block[2] if block else "", _Loader)
        return ModelCard.load(readme)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{readme} has metadata that cannot be read ({reason}); correct what is between ---."
        ) from error


def listed(value: object) -> list[str]:
    """The strings of a field of a card's metadata, which may hold anything."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def complete_cards() -> None:
    """Have PEFT complete the cards of side adapters, when it saves them and when it pushes them."""
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @functools.wraps(create)
    def create_or_update_model_card(self: PeftModel, output_dir: str | os.PathLike[str], **adapter: str) -> None:
        config, readme = self.active_peft_config, Path(output_dir, "README.md")
        if not isinstance(config, SideTuningConfig):
            return create(self, os.fspath(output_dir))
        try:
            # PEFT replaces tags by its own, and fills a new card with a form.
            card = load_card(readme)
            card.save(readme)
            create(self, os.fspath(output_dir))
            training = getattr(self, "training_metadata", None)
            complete(readme, config, listed(card.data.tags), training=training, **adapter)
        except ValueError as error:
            # The weights are still to be saved.
            warnings.warn(f"{error} The card stays as it is.", stacklevel=2)

    @functools.wraps(upload)
    def _upload_modified_files(self: PeftModel, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # transformers has put a card of its own in the place of PEFT's.
        if isinstance(self.active_peft_config, SideTuningConfig):
            create_or_update_model_card(self, working_dir, adapter=repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    for replacement in (create_or_update_model_card, _upload_modified_files):
        setattr(PeftModel, replacement.__name__, replacement)
