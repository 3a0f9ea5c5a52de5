"""Which bases a side network works beside: every causal language model of the installed transformers, small and random.

    python -m benchmarks.families [TYPE ...]      checks all, or these, and writes the table of docs/models.md

Each is wrapped, trained for two steps, saved, loaded, and generates. What is compared are equivalences: new = base,
disabled = base, padded = unpadded, reloaded = tuned, cached = uncached, states reused = states computed. Where the
base's own logits depend on padding or on its cache, that comparison is left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, __version__
from transformers.utils import logging

from benchmarks.common import HERE
from benchmarks.document import markdown
from benchmarks.small_bases import SIZES, VOCABULARY, families, small_base
from qtuning_peft import SideTuningConfig
from qtuning_peft.states import cache_states, reuse_of

RESULTS = HERE / "results" / "families.json"
DOCUMENT = HERE.parent / "docs" / "models.md"
WORKS = "works"
TOLERANCE = 1e-4
PREFIX = 6


def tokens(rows: int = 2, length: int = 10) -> Tensor:
    """Random tokens, (rows, length), the first `PREFIX` of each row the same."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :PREFIX] = ids[0, :PREFIX]
    return ids


def differs(first: Tensor, second: Tensor) -> bool:
    """Whether logits differ by more than rounding."""
    return bool((first - second).abs().max() > TOLERANCE * max(1.0, first.abs().max().item()))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits (rows, length, vocabulary)."""
    return model.eval()(input_ids=ids, **inputs).logits


@torch.no_grad()
def padded_differ(model: Any) -> bool:
    """Whether a row's logits depend on what pads it at the right."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return differs(logits(model, ids, attention_mask=mask)[0, :-3], logits(model, ids[:1, :-3])[0])


@torch.no_grad()
def cached_differ(model: Any) -> bool:
    """Whether what is generated depends on the key-value cache."""
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = [
        torch.stack(model.eval().generate(tokens(), **options, eos_token_id=None, use_cache=cached).logits, 1)
        for cached in (True, False)
    ]
    return differs(*found)


def loss_of(model: Any) -> Tensor:
    """The loss of one batch whose rows begin alike, of the tokens behind that."""
    ids = tokens()
    labels = ids.clone()
    labels[:, : PREFIX + 1] = -100
    mask = torch.ones_like(ids)
    return model.train()(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss


def step(model: Any) -> None:
    """One optimizer step of size 0.1 on every trainable parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_of(model).backward()
    torch.optim.SGD(trained, lr=0.1).step()
    model.zero_grad()


def check(base: PreTrainedModel, **fields: Any) -> str:
    """`works`, or which equivalence does not hold, or the sentence of the refusal."""
    try:
        return next(_failures(deepcopy(base), base, fields), WORKS)
    except ValueError as refusal:
        return f"refused: {refusal}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"


def _failures(base: PreTrainedModel, untouched: PreTrainedModel, fields: dict[str, Any]) -> Iterator[str]:
    config = SideTuningConfig(reduction_factor=4, tap_every=2, task_type="CAUSAL_LM", **fields)
    of_the_base = logits(base, tokens())
    model: Any = get_peft_model(base, config)
    if differs(logits(model, tokens()), of_the_base):
        yield "differs: new = base"
    for _ in range(2):
        step(model)
    if any(p.grad is not None or p.requires_grad for n, p in model.named_parameters() if "qst_side_network" not in n):
        yield "differs: a gradient in the base"
    with torch.no_grad():  # far enough away that nothing hides in rounding
        for name, parameter in model.named_parameters():
            if "qst_side_network" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tuned = logits(model, tokens())
    if not tuned.isfinite().all() or not differs(tuned, of_the_base):
        yield "differs: tuned from base"
    with model.disable_adapter():
        if differs(logits(model, tokens()), of_the_base):
            yield "differs: disabled = base"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if differs(logits(PeftModel.from_pretrained(deepcopy(untouched), folder), tokens()), tuned):
            yield "differs: reloaded = tuned"
    for name, differ in (("padded = unpadded", padded_differ), ("cached = uncached", cached_differ)):
        if not _fails(differ, untouched) and differ(model):
            yield f"differs: {name}"
    plain = loss_of(model)
    reuse: Any = reuse_of(model)
    reuse.cache_prefix(tokens()[0, :PREFIX].tolist())
    if differs(loss_of(model), plain):
        yield "differs: prefix caching"
    reuse.cache_prefix([])
    cache_states(model, 2**24)
    loss_of(model)
    if (loss_of(model) - plain).abs() > 0.02 * plain.abs():  # states are cached in 16 bits
        yield "differs: hidden-state cache"


def _fails(differ: Callable[[Any], bool], base: PreTrainedModel) -> bool:
    try:
        return differ(base)
    except Exception:
        return True


def check_classifier(base: PreTrainedModel) -> str:
    """As `check`, of a classification head on this base, if transformers has one."""
    try:
        torch.manual_seed(0)
        config = deepcopy(base.config)
        config.num_labels = 3
        classifier = AutoModelForSequenceClassification.from_config(config)
    except Exception:
        return "none"
    try:
        model: Any = get_peft_model(classifier, SideTuningConfig(reduction_factor=4, task_type="SEQ_CLS")).train()
        ids = tokens()
        ids[:, -1] = SIZES["eos_token_id"]  # where some read the class
        model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    except ValueError as refusal:
        return f"refused: {refusal}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    side = any("qst_side_network" in name for name in trained)
    return WORKS if side and any("modules_to_save" in name for name in trained) else f"differs: trains {trained[:3]}"


def row_of(name: str) -> dict[str, str]:
    """What became of one family."""
    config, model = families()[name]
    row = {"family": name, "model": model.__name__, "transformers": __version__}
    try:
        base = small_base(config, model)
    except Exception as error:
        return row | {"not built": f"{type(error).__name__}: {error}"}
    return row | {
        "default": check(base),
        "side_attention": check(base, side_attention=True),
        "classifier": check_classifier(base),
    }


def shown(result: str) -> str:
    """A result in a cell."""
    return result.strip().splitlines()[0].replace("|", "/")[:250]


def table(found: list[dict[str, str]]) -> str:
    """The families in Markdown."""
    built = [row for row in found if "not built" not in row]
    lines = [
        [f"`{row['family']}`", row["model"], *(shown(row[key]) for key in ("default", "side_attention", "classifier"))]
        for row in built
    ]
    missing = [[f"`{row['family']}`", row["model"], shown(row["not built"])] for row in found if row not in built]
    versions = "/".join(sorted({row["transformers"] for row in found}))
    count = Counter(row["default"].split(":")[0] for row in built)
    return "\n\n".join([
        f"(`python -m benchmarks.families`; transformers {versions}; {len(built)} families built: "
        f"{', '.join(f'{number} {what}' for what, number in count.most_common())}.)",
        markdown(["`model_type`", "model", "default", "with `side_attention`", "classifier"], lines),
        "Not built small from their config class alone:",
        markdown(["`model_type`", "model", "why"], missing),
    ])  # fmt: skip


def main() -> None:
    """Check, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="TYPE", help="a `model_type`; all of transformers' registry without"
    )
    names = parser.parse_args().names or list(families())
    if unknown := set(names) - set(families()):
        parser.error(f"TYPE is {', '.join(sorted(unknown))}; choose from transformers' causal language models.")
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = {row["family"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for number, name in enumerate(names, 1):
        known[name] = row_of(name)
        print(f"[{number}/{len(names)}]", *(f"{key}: {value}" for key, value in known[name].items()), flush=True)
    rows = [known[name] for name in families() if name in known]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    write(DOCUMENT, rows)


def write(document: Path, rows: list[dict[str, str]]) -> None:
    """Put the table into `document`."""
    before, rest = document.read_text(encoding="utf-8").split("<!-- families -->", 1)
    behind = rest.split("<!-- end families -->", 1)[1]
    text = f"{before}<!-- families -->\n{table(rows)}\n<!-- end families -->{behind}"
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
