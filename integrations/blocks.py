"""The two YAML blocks that turn a trainer's recipe into ours: `qst:` and `eu_pruning:`.

Every trainer's integration reads the same two, so that a block can be moved from one trainer's file to another's. A
wrong key or value fails while the file is read, naming the field.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, TypeVar, get_type_hints

from peft import PeftConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from transformers import TrainerCallback

from qtuning_peft.eu_plane import EUPruner, EUPruningCallback
from qtuning_peft.side_tuning import SideTuningConfig
from qtuning_peft.trainer import HiddenStateCacheCallback

Block = TypeVar("Block", bound=BaseModel)


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=False)


class _QSTBlock(_Block):
    @model_validator(mode="after")
    def _check(self) -> _QSTBlock:
        self.peft_config()
        return self

    def peft_config(self, task_type: str = "CAUSAL_LM") -> SideTuningConfig:
        """The PEFT configuration that this block describes."""
        of_adapter = {field.name for field in fields(SideTuningConfig)}
        return SideTuningConfig(**self.model_dump(exclude_unset=True, include=of_adapter), task_type=task_type)


def _qst_block() -> type[_QSTBlock]:
    """A model with every field of `SideTuningConfig` that PEFT's own base class does not have."""
    inherited = {field.name for field in fields(PeftConfig)}
    types = get_type_hints(SideTuningConfig)
    own: dict[str, Any] = {
        field.name: (types[field.name], Field(default=field.default, description=field.metadata["help"]))
        for field in fields(SideTuningConfig)
        if field.name not in inherited
    }
    return create_model("QSTBlock", __base__=_QSTBlock, __doc__="The block `qst`: a `SideTuningConfig`.", **own)


QSTBlock = _qst_block()


class QSTTrainingBlock(QSTBlock):  # type: ignore[misc,valid-type]  # its base is made at run time
    """The block `qst` where callbacks can be added to the trainer: also what to keep from epoch to epoch."""

    hidden_state_cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="GiB of main memory for the base's hidden states, so that epochs after the first cost the side "
        "network alone (`HiddenStateCacheCallback`). By default none are kept.",
    )

    def callbacks(self) -> list[TrainerCallback]:
        """What the block asks the trainer for; see `qtuning_peft.trainer`."""
        return [] if self.hidden_state_cache_gib is None else [HiddenStateCacheCallback(self.hidden_state_cache_gib)]


class EUPruningBlock(_Block):
    """The block `eu_pruning`: what to keep of the training data, and where scores and the report go."""

    mode: Literal["static", "dynamic"] = Field(
        default="static",
        description="static: the whole data set is scored once, before training, and pruned by thresholds for all of "
        "it. dynamic: every mini-batch is scored and pruned under the model as it is then, as published.",
    )
    sample_ratio: float | None = Field(default=None, description="Share of the samples to keep, in (0, 1].")
    num_samples: int | None = Field(default=None, description="Number of samples to keep, instead of a share.")
    num_tokens: int | None = Field(default=None, description="Number of supervised tokens to keep, instead of a share.")
    token_ratio: float = Field(
        default=1.0, description="Share of the supervised tokens to keep in misconceptions, in (0, 1]."
    )
    strategy: str = Field(
        default="eu_plane",
        description="eu_plane, or to compare: random, longest, highest_perplexity, lowest_perplexity, entropy, el2n, "
        "infobatch, ifd.",
    )
    token_strategy: str = Field(default="neighbours", description="neighbours, random, or rho1.")
    neighbour_weight: float = Field(default=0.5, description="Weight of a token's neighbours, 0 to 1.")
    keep_tokens: str = Field(default="lowest", description="Which end of the tokens' ranking stays: lowest or highest.")
    remove_tokens: bool = Field(
        default=False, description="Take trimmed tokens out of the input instead of masking them from the loss."
    )
    protect: str | list[str] = Field(
        default_factory=list, description="Regular expressions for text that is never trimmed, such as '####.*'."
    )
    max_repetition: float | None = Field(
        default=None, description="Drop rows that repeat themselves more than this, 0 to 1, as degenerate."
    )
    seed: int = Field(default=0, description="Seed for strategies that draw.")
    scorer_model: str | None = Field(
        default=None,
        description="Model that scores, a folder or a name on the Hub; must share the base's tokenizer. Default: the "
        "base as it is trained, without its adapter, so nothing more is loaded.",
    )
    reference_model: str | None = Field(default=None, description="Second model, for token_strategy rho1.")
    tokens_per_batch: int = Field(
        default=4096, ge=1, description="Tokens in a forward pass that scores, padding included."
    )
    cache_path: str | None = Field(
        default=None,
        description="Folder that keeps scores; an interrupted run goes on from there, and other ratios need no new "
        "scores. Default: eu_scores in the folder of prepared data, or else in the output folder.",
    )
    report_path: str | None = Field(
        default=None, description="HTML report on what is kept. Default: eu_report.html in the output folder."
    )

    @model_validator(mode="after")
    def _check(self) -> EUPruningBlock:
        pruner = self.pruner(None)
        if self.mode == "dynamic":
            EUPruningCallback(pruner)
            for name in ("scorer_model", "reference_model", "cache_path", "report_path"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, which only mode static uses; leave it out.")
        elif (self.token_strategy == "rho1") != (self.reference_model is not None):
            raise ValueError(
                f"token_strategy is {self.token_strategy!r} and reference_model {self.reference_model!r}; rho1 needs a "
                "reference model, and nothing else does."
            )
        return self

    def pruner(self, tokenizer: Any) -> EUPruner:
        """The pruner that this block describes.

        Args:
            tokenizer: The model's tokenizer; without it nothing is protected from trimming.
        """
        elsewhere = {"mode", "scorer_model", "reference_model", "tokens_per_batch", "cache_path", "report_path"}
        arguments = self.model_dump(exclude=elsewhere | (set() if tokenizer is not None else {"protect"}))
        return EUPruner(**arguments, tokenizer=tokenizer)


def read_block(name: str, kind: type[Block], content: Any) -> Block:
    """Read the block `name` of a YAML file.

    Args:
        name: Its key, for messages.
        kind: `QSTBlock` or `EUPruningBlock`.
        content: What stands under the key; nothing at all means defaults.

    Raises:
        ValueError: in one sentence, naming the field, when it is wrong.
    """
    try:
        return kind.model_validate({} if content is None else content)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join([name, *(str(part) for part in found["loc"])])
        if found["type"] == "extra_forbidden":
            raise ValueError(f"{where} is no field; choose from {', '.join(kind.model_fields)}.") from None
        cause = str(found.get("ctx", {}).get("error", "")) or f"{found['msg']}, not {found['input']!r}."
        raise ValueError(f"{where}: {cause}") from None
