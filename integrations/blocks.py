"""The two YAML blocks, `qst:` and `eu_pruning:`, the same in every trainer's recipe."""

from collections.abc import Collection
from dataclasses import Field as Option
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, TypeVar, get_type_hints

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from transformers import TrainerCallback

from qtuning_peft.eu_plane import EUPruner
from qtuning_peft.eu_plane.training import for_batches
from qtuning_peft.registry import Registry, help_of
from qtuning_peft.side_tuning import SideTuningConfig
from qtuning_peft.trainer import HiddenStateCacheCallback

Block = TypeVar("Block", bound=BaseModel)


def _options_of(config: type, without: Collection[str]) -> Any:
    """A pydantic model with the fields of a dataclass, those of `without` excepted."""
    types = get_type_hints(config)
    own: dict[str, Any] = {
        option.name: (types[option.name], Field(default=option.default, json_schema_extra=partial(_describe, option)))
        for option in fields(config)
        if option.init and option.name not in without
    }
    return create_model(config.__name__, __config__=ConfigDict(extra="forbid", validate_default=False), **own)


def _describe(option: Option[Any], schema: dict[str, Any]) -> None:
    """Add an option's help to its JSON schema, with the choices that are registered when the schema is made."""
    schema["description"] = help_of(option)
    if isinstance(choices := option.metadata.get("choices"), Registry):
        schema["enum"] = [*choices]


_AdapterOptions: Any = _options_of(SideTuningConfig, {field.name for field in fields(PeftConfig)})
# The others have no use on rows that a trainer has tokenized.
_PrunerOptions: Any = _options_of(EUPruner, ("tokenizer", "per_batch", "keep_dropped"))


class QSTBlock(_AdapterOptions):
    """The block `qst`: a `SideTuningConfig`."""

    @model_validator(mode="after")
    def _check(self) -> "QSTBlock":
        self.peft_config()
        return self

    def peft_config(self, task_type: str = "CAUSAL_LM") -> SideTuningConfig:
        """The PEFT configuration that this block describes."""
        options = self.model_dump(exclude_unset=True, include={*_AdapterOptions.model_fields})
        return SideTuningConfig(**options, task_type=task_type)


class QSTTrainingBlock(QSTBlock):
    """The block `qst` where callbacks can be added to the trainer: also what to keep from epoch to epoch."""

    hidden_state_cache_gib: float | None = Field(
        default=None, gt=0, description="GiB of main memory for the base's hidden states, so that epochs after the "
        "first cost the side network alone (`HiddenStateCacheCallback`). By default none are kept.",
    )  # fmt: skip

    states: str | None = Field(
        default=None, description="Folder of the base's hidden states: one of `qtuning states`, or one that is filled "
        "in the first epoch, for this run and those that follow. In place of hidden_state_cache_gib.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_one(self) -> "QSTTrainingBlock":
        if self.states is not None and self.hidden_state_cache_gib is not None:
            raise ValueError("states and hidden_state_cache_gib are both set; the states are kept in one place.")
        return self

    def callbacks(self) -> list[TrainerCallback]:
        """What the block asks the trainer for; see `qtuning_peft.trainer`."""
        if self.hidden_state_cache_gib is None and self.states is None:
            return []
        return [HiddenStateCacheCallback(self.hidden_state_cache_gib, self.states)]


class EUPruningBlock(_PrunerOptions):
    """The block `eu_pruning`: the options of `EUPruner`, and where scores and the report go."""

    mode: Literal["static", "dynamic"] = Field(
        default="static", description="static: the whole data set is scored once, before training, and pruned by "
        "thresholds for all of it. dynamic: every mini-batch is scored and pruned, under the model as it is then, as "
        "published; beside a side network by the pass that trains, with others by one more forward pass.",
    )  # fmt: skip
    scorer_model: str | None = Field(
        default=None, description="Model that scores, a folder or a name on the Hub; must share the base's tokenizer. "
        "Default: the base as it is trained, without its adapter, so nothing more is loaded.",
    )  # fmt: skip
    reference_model: str | None = Field(default=None, description="Second model, for token_strategy rho1.")
    tokens_per_batch: int = Field(default=4096, ge=1, description="Tokens in a scoring pass, padding included.")
    cache_path: str | None = Field(
        default=None, description="Folder that keeps scores; an interrupted run goes on from there, and other ratios "
        "need no new scores. Default: eu_scores in the folder of prepared data, or else in the output folder.",
    )  # fmt: skip
    report_path: str | None = Field(
        default=None, description="HTML report on what is kept. Default: eu_report.html in the output folder."
    )

    @model_validator(mode="after")
    def _check(self) -> "EUPruningBlock":
        pruner = self.pruner(None)
        if self.mode == "dynamic":
            for_batches(pruner)
            for name in ("scorer_model", "reference_model", "cache_path", "report_path"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, which only mode static uses; leave it out.")
        elif ("token_reference_error" in pruner.scores) != (self.reference_model is not None):
            raise ValueError(
                f"token_strategy is {self.token_strategy!r} and reference_model {self.reference_model!r}; rho1 needs a "
                "reference model, and nothing else does."
            )
        return self

    def pruner(self, tokenizer: Any) -> EUPruner:
        """The pruner that this block describes; without the model's tokenizer nothing is protected from trimming."""
        names = {*_PrunerOptions.model_fields} - ({"protect"} if tokenizer is None else set())
        return EUPruner(**self.model_dump(include=names), tokenizer=tokenizer)


def read_block(name: str, kind: type[Block], content: Any) -> Block:
    """Read the block of class `kind` under the key `name` of a YAML file; `None` means defaults.

    Raises:
        ValueError: in one sentence, naming the field, when it is wrong.
    """
    try:
        return kind.model_validate({} if content is None else content)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join([name, *map(str, found["loc"])])
        if found["type"] == "extra_forbidden":
            meant = get_close_matches(str(found["loc"][-1]), kind.model_fields, 1)
            remedy = f"did you mean {meant[0]}?" if meant else f"choose from {', '.join(kind.model_fields)}."
            raise ValueError(f"{where} is no field; {remedy}") from None
        cause = str(found.get("ctx", {}).get("error", "")) or f"{found['msg']}, not {found['input']!r}."
        raise ValueError(f"{where}: {cause}") from None
