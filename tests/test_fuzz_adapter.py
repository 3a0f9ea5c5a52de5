"""Whatever an adapter's files hold, loading and showing it ends in an adapter or a sentence, soon, in little memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, tiny, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from qtuning_peft import SideTuningConfig
from qtuning_peft.cli.data import USER_ERRORS
from qtuning_peft.hub.sharing import describe

# FUZZ_CASES=5000 for a long look.
CASES = pytest.mark.parametrize("cases", [int(os.environ.get("FUZZ_CASES", "100"))])
FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
SECONDS, KIBIBYTES = 5, 500 * 2**10


def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM", reduction_factor=8))
        randomize_side_network(model)
        model.save_pretrained(folder)
        return {name: (Path(folder) / name).read_bytes() for name in FILES}


GOOD = saved()
numbers = st.one_of(st.integers(), st.integers(-3, 70), st.floats())
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12))
values = st.recursive(
    leaves,
    lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(st.text(max_size=6), v, max_size=3)),
    max_leaves=9,
)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes changed, cut off or put in."""
    place = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(["overwrite", "cut off", "insert"]))
    new = draw(st.binary(max_size=64))
    if kind == "cut off":
        return content[:place]
    return content[:place] + new + content[place + (len(new) if kind == "overwrite" else 0) :]


@st.composite
def configs(draw: Any) -> bytes:
    config = json.loads(GOOD["adapter_config.json"])
    for name in draw(
        st.lists(
            st.sampled_from([*sorted(config.keys() - {"peft_type"}), "unknown", "__class__"]), min_size=1, max_size=3
        )
    ):
        config[name] = draw(values)
    return json.dumps(config).encode()


@st.composite
def headers(draw: Any) -> bytes:
    """Safetensors whose header says something else."""
    content = GOOD["adapter_model.safetensors"]
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for name in draw(st.lists(st.sampled_from([*header, "other"]), min_size=1, max_size=3)):
        field = draw(st.sampled_from(["shape", "dtype", "data_offsets", None]))
        if field is None or not isinstance(header.get(name), dict):
            header[name] = draw(values)
        else:
            header[name][field] = draw(st.one_of(values, st.lists(st.integers(-1, 2**62), max_size=3)))
    written = json.dumps(header).encode()
    return (
        struct.pack("<Q", draw(st.one_of(st.just(len(written)), st.integers(0, 2**64 - 1))))
        + written
        + content[8 + size :]
    )


KINDS = {
    "config": ("adapter_config.json", configs()),
    "config's bytes": ("adapter_config.json", damaged(GOOD["adapter_config.json"])),
    "header": ("adapter_model.safetensors", headers()),
    "weights' bytes": ("adapter_model.safetensors", damaged(GOOD["adapter_model.safetensors"])),
    "card": ("README.md", st.one_of(damaged(GOOD["README.md"]), st.builds(
        lambda data, text: f"---\n{json.dumps(data)}\n---\n{text}".encode(errors="replace"),
        st.dictionaries(st.sampled_from(["tags", "license", "model-index", "datasets", "base_model", "x"]), values),
        st.text(max_size=50),
    ))),
}  # fmt: skip


def one_sentence(error: Exception) -> None:
    assert isinstance(error, USER_ERRORS), repr(error)
    assert len(str(error)) < 2000
    assert "\n" not in str(error).strip(), str(error)


@CASES
@pytest.mark.parametrize("kind", KINDS)
def test_any_adapter(kind: str, cases: int) -> None:
    name, strategy = KINDS[kind]
    base = tiny()
    expected = base(input_ids=token_ids()).logits

    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def check(content: bytes) -> None:
        began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for file, good in GOOD.items():
                (Path(folder) / file).write_bytes(content if file == name else good)
            unknown = False
            for use in (lambda: describe(folder), lambda: PeftModel.from_pretrained(base, folder).unload()):
                try:
                    use()
                except Exception as error:
                    # Where the method is unknown PEFT raises an error of its own, before it asks anybody else.
                    if not (unknown and isinstance(error, KeyError)):
                        one_sentence(error)
                    unknown = "of an unknown method" in str(error)
        assert time.process_time() - began < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KIBIBYTES

    check()
    # No refusal has changed the base.
    assert torch.equal(base(input_ids=token_ids()).logits, expected)
