"""An untrusted adapter: whatever its files hold, it loads as data, or is refused whole and the model is as before."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, tiny, token_ids, word_tokenizer
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from qtuning_peft import SideTuningConfig
from qtuning_peft.side_tuning.network import DOWNSAMPLERS, MIXINGS
from qtuning_peft.side_tuning.network.settings import COMPUTE_DTYPES
from qtuning_peft.side_tuning.peft import untrusted as safe_loading

WEIGHTS, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
PREFIX = "base_model.model.model.norm.qst_side_network."
FIRST = PREFIX + "blocks.0.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]
Fields = dict[str, Any]


def side_tuned(**options: object) -> PeftModel:
    model = get_peft_model(tiny(), SideTuningConfig(**{"reduction_factor": 4, "task_type": "CAUSAL_LM"} | options))
    randomize_side_network(model)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter."""
    folder = tmp_path_factory.mktemp("good")
    side_tuned().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A sound adapter, to be damaged."""
    return shutil.copytree(good, tmp_path / "adapter")


def snapshot(model: torch.nn.Module) -> list[object]:
    """Everything that loading an adapter could leave behind."""
    modules = list(model.named_modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for _, m in modules]
    flags = [(name, p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()]
    configs = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    return [
        [(name, id(m), type(m), m.training, "forward" in vars(m)) for name, m in modules],
        hooks,
        flags,
        configs,
        getattr(model, "_hf_peft_config_loaded", None),
        getattr(model, "active_adapter", None) if isinstance(model, PeftModel) else None,
        {name: tensor.numpy(force=True).tobytes() for name, tensor in model.state_dict().items()},
    ]


def base_then_peft(folder: Path) -> tuple[torch.nn.Module, Callable[[], object]]:
    base = tiny()
    return base, lambda: PeftModel.from_pretrained(base, folder)


def beside_another(folder: Path) -> tuple[torch.nn.Module, Callable[[], object]]:
    model = side_tuned()
    return model, lambda: model.load_adapter(folder, adapter_name="untrusted")


def base_then_transformers(folder: Path) -> tuple[torch.nn.Module, Callable[[], object]]:
    base = tiny()
    return base, lambda: base.load_adapter(str(folder))


def beside_another_in_transformers(folder: Path) -> tuple[torch.nn.Module, Callable[[], object]]:
    base = tiny()
    base.add_adapter(SideTuningConfig(reduction_factor=4), adapter_name="own")
    return base, lambda: base.load_adapter(str(folder), adapter_name="untrusted")


WAYS = (base_then_peft, beside_another, base_then_transformers, beside_another_in_transformers)


def loaded_or_refused(folder: Path) -> PeftModel | None:
    """The model, or nothing where the adapter was refused without a trace."""
    base = tiny()
    before = snapshot(base)
    error: Exception | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return PeftModel.from_pretrained(base, folder)
        except (ValueError, TypeError) as refusal:
            error = refusal
    assert len(str(error)) < 2000
    assert snapshot(base) == before
    return None


def assert_refused(
    folder: Path, message: str, kinds: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> None:
    """Every way of loading gives one error of one line and leaves no trace."""
    for way in WAYS:
        model, load = way(folder)
        before = snapshot(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(kinds, match=message) as refusal:
                load()
        assert len(str(refusal.value)) < 2000
        if kinds is ValueError:
            assert "\n" not in str(refusal.value)
        assert snapshot(model) == before, way.__name__


def edit_config(folder: Path, **values: object) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# -- pickles -------------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("name", [PICKLED, WEIGHTS])
@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
def test_nothing_is_unpickled(
    name: str, zipped: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = tmp_path / "it ran"
    (folder / WEIGHTS).unlink()
    if zipped:
        torch.save({FIRST: Payload(proof)}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps({FIRST: Payload(proof)}))
    opened: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append(args))
    assert_refused(folder, "a pickle, .* ask for the adapter" if name == PICKLED else "no valid safetensors file")
    assert not opened
    assert not proof.exists()


def test_a_repository_with_only_a_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repository: str, name: str, **options: object) -> str:
        asked.append(name)
        if name == CONFIG:
            return str(folder / CONFIG)
        raise EntryNotFoundError(name)

    for module in (safe_loading, __import__("peft.config", fromlist=["config"])):
        monkeypatch.setattr(module, "hf_hub_download", download)
    base = tiny()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"someone/adapter has no readable adapter_model\.safetensors"):
        PeftModel.from_pretrained(base, "someone/adapter")
    assert snapshot(base) == before
    assert PICKLED not in asked


# -- files that are no safetensors -------------------------------------------------------------------------------


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> Fields:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "cut in the data": lambda good: good[: len(good) // 2],
    "cut in the header": lambda good: good[:100],
    "one byte too many": lambda good: good + b"\0",
    "header longer than the file": lambda good: (2**40).to_bytes(8, "little") + good[8:],
    "header of the largest length": lambda good: b"\xff" * 8 + good[8:],
    "header of no length": lambda good: bytes(8) + good[8:],
    "header shorter than it is": lambda good: (20).to_bytes(8, "little") + good[8:],
    "header no JSON": lambda good: with_header(b"not JSON" * 20),
    "header no object": lambda good: with_header([1, 2]),
    "header nested": lambda good: with_header(b'{"a":' * 5000),
    "header not UTF-8": lambda good: with_header(b'{"\xff\xfe": 1}'),
    "overlapping": lambda good: with_header({FIRST: entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)),
    "offsets beyond the file": lambda good: with_header({FIRST: entry([4], 0, 16)}, bytes(8)),
    "offsets backwards": lambda good: with_header({FIRST: entry([4], 16, 0)}, bytes(16)),
    "offsets negative": lambda good: with_header({FIRST: entry([4], -16, 0)}, bytes(16)),
    "huge shape": lambda good: with_header({FIRST: entry([2**40, 2**40], 0, 16)}, bytes(16)),
    "huge empty shape": lambda good: with_header({FIRST: entry([0, 2**63], 0, 0)}),
    "huge number": lambda good: with_header(b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b"]}}"),
    "unknown dtype": lambda good: with_header({FIRST: entry([4], 0, 16, "OBJECT")}, bytes(16)),
}


@pytest.mark.parametrize("name", FILES)
def test_malformed_files(name: str, folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(FILES[name](file.read_bytes()))
    assert_refused(folder, "The adapter lacks" if name == "huge empty shape" else "no valid safetensors file")


def test_a_file_larger_than_its_configuration(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 2**36)
    assert_refused(folder, "is 68719476736 bytes large and its configuration needs at most")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link", "missing"])
def test_what_is_no_file(kind: str, folder: Path, tmp_path: Path) -> None:
    file = folder / WEIGHTS
    torch.save(load_file(file), folder / PICKLED)
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nowhere")
    assert_refused(folder, "no readable adapter_model.safetensors")


def test_a_link_to_a_sound_file_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    file = folder / WEIGHTS
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    for way in WAYS:
        way(folder)[1]()
    (tmp_path / "blob").write_bytes(b"root:x:0:0:root:/root:/bin/sh\n" * 4)
    assert_refused(folder, "no valid safetensors file")


# -- tensors ---------------------------------------------------------------------------------------------------------


def put(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key] = value(tensors[FIRST].clone()).contiguous()

    return change


def holding(value: float) -> Callable[[Tensors], None]:
    return put(FIRST, lambda t: t.index_fill(0, torch.tensor([63]), value))


def without_first(tensors: Tensors) -> None:
    del tensors[FIRST]


FOREIGN = "base_model.model.model.layers.0.q_proj.lora_A.weight"
TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "NaN": (holding(float("nan")), "blocks.0.mlp.up_proj.weight holds values that are not finite"),
    "infinity": (holding(float("inf")), "not finite"),
    "negative infinity": (holding(-float("inf")), "not finite"),
    "half NaN": (put(FIRST, lambda t: t.half() * float("nan")), "not finite"),
    "integers": (put(FIRST, lambda t: t.to(torch.int64)), "up_proj.weight has dtype I64; save it as float32"),
    "booleans": (put(FIRST, lambda t: t > 0), "has dtype BOOL"),
    "float64": (put(FIRST, lambda t: t.double()), "has dtype F64"),
    "float8": (put(FIRST, lambda t: t.to(torch.float8_e4m3fn)), "has dtype F8"),
    "transposed": (put(FIRST, lambda t: t.T), r"has shape \(16, 64\), the side network needs \(64, 16\)"),
    "flat": (put(FIRST, lambda t: t.flatten()), r"has shape \(1024,\)"),
    "no elements": (put(FIRST, lambda t: t[:0]), r"has shape \(0, 16\)"),
    "one to broadcast": (put(FIRST, lambda t: t[:1, :1]), r"has shape \(1, 1\)"),
    "missing": (without_first, "lacks blocks.0.mlp.up_proj.weight"),
    "none": (lambda tensors: tensors.clear(), "lacks blocks.0"),
    "one more block": (put(PREFIX + "blocks.3.norm.weight", lambda t: t), "has blocks.3.norm.weight too many"),
    "weights of the base": (
        put("base_model.model.model.embed_tokens.weight", lambda t: t),
        "has base_model.model.model.embed_tokens.weight too many",
    ),
    "of another method": (put(FOREIGN, lambda t: t), "lora_A.weight too many"),
    "a path as a name": (put("../../../etc/passwd", lambda t: t), "has ../../../etc/passwd too many"),
    "lines in a name": (put("x\nTraceback: \x1b[31m", lambda t: t), r"has 'x\\nTraceback"),
    "a long name": (put("x" * 10**6, lambda t: t), "has xxx"),
    "an adapter name inside": (put(PREFIX + "default.norm.weight", lambda t: t), "default.norm.weight too many"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(name: str, folder: Path) -> None:
    change, message = TENSORS[name]
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    assert_refused(folder, message)


@pytest.mark.parametrize("metadata", [None, {"format": "np"}, {"format": "pt", "code": "import os"}])
def test_metadata_does_not_matter(metadata: dict[str, str] | None, folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata=metadata)
    for way in WAYS:
        way(folder)[1]()


def test_a_bad_file_leaves_an_adapter_that_exists(folder: Path) -> None:
    model = PeftModel.from_pretrained(tiny(), folder)
    tensors = load_file(folder / WEIGHTS)
    holding(float("nan"))(tensors)
    save_file(tensors, folder / WEIGHTS)
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite"):
        model.load_adapter(folder, adapter_name="default")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("score.weight", torch.full((3, 64), float("nan")), "score.weight holds values that are not finite"),
        ("score.weight", torch.zeros(4, 64), r"score.weight has shape \(4, 64\)"),
        ("score.weight", None, "lacks base_model.model.score.weight"),
        ("score.bias", torch.zeros(3), "has base_model.model.score.bias too many"),
    ],
)
def test_a_head_beside_the_side_network(key: str, value: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(
            LlamaConfig(
                hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50,
                pad_token_id=0, num_labels=3,
            )
        )  # fmt: skip

    get_peft_model(base(), SideTuningConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    sound = PeftModel.from_pretrained(base(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    if value is None:
        del tensors[f"base_model.model.{key}"]
    else:
        tensors[f"base_model.model.{key}"] = value
    save_file(tensors, tmp_path / WEIGHTS)
    model = base()
    for target, load in (
        (model, lambda: PeftModel.from_pretrained(model, tmp_path)),
        (sound, lambda: sound.load_adapter(tmp_path, adapter_name="untrusted")),
    ):
        before = snapshot(target)
        with pytest.raises(ValueError, match=message):
            load()
        assert snapshot(target) == before


# -- config ----------------------------------------------------------------------------------------------------------

HUGE = 10**12
CONFIGS: list[tuple[Fields, str]] = [
    ({"reduction_factor": HUGE}, f"reduction_factor is {HUGE}; give an integer of at most"),
    ({"reduction_factor": 10**4000}, r"reduction_factor is 10+\.\.\.0+; give an integer of at most"),
    ({"reduction_factor": 2**19}, "reduction_factor is 524288, which leaves no usable side width"),
    ({"reduction_factor": -4}, "reduction_factor is -4; give an integer of at least 2"),
    ({"reduction_factor": "4"}, "reduction_factor is '4';"),
    ({"reduction_factor": [4]}, r"reduction_factor is \[4\];"),
    ({"reduction_factor": None}, "reduction_factor is None;"),
    ({"reduction_factor": 1e400}, "reduction_factor is inf;"),
    ({"downsample": {"a": 1}}, r"downsample is \{'a': 1\}; choose one of"),
    ({"downsample": "os.system"}, "downsample is 'os.system'; choose"),
    ({"downsample_rank": HUGE, "downsample": "lora"}, f"downsample_rank is {HUGE}; give an integer of at most"),
    ({"downsample_rank": 65, "downsample": "lora"}, "downsample_rank is 65, more than the base's hidden size of 64"),
    ({"downsample_rank": True}, "downsample_rank is True;"),
    ({"num_side_heads": HUGE}, f"num_side_heads is {HUGE};"),
    ({"num_side_heads": 2**19, "side_attention": True}, "num_side_heads is 524288, which does not split"),
    ({"layers_to_transform": [HUGE]}, "give distinct block indices"),
    ({"layers_to_transform": [3]}, "layers_to_transform names block 3, but the base has blocks 0 to 2"),
    ({"layers_to_transform": list(range(10**5))}, "layers_to_transform names block 99999"),
    ({"layers_to_transform": [0] * 10**5}, "give distinct block indices"),
    ({"layers_to_transform": [0, "1"]}, r"layers_to_transform is \[0, '1'\]"),
    ({"layers_to_transform": {"0": 1}}, "layers_to_transform is"),
    ({"base_hidden_size": HUGE}, "base_hidden_size is"),
    ({"base_hidden_size": 128}, "base_hidden_size of the adapter is 128, but this base has 64"),
    ({"base_num_layers": 2}, "base_num_layers of the adapter is 2, but this base has 3"),
    ({"side_dropout": float("nan")}, "side_dropout is nan"),
    ({"side_dropout": "0.1"}, "side_dropout is '0.1'"),
    ({"side_dropout": False}, "side_dropout is False"),
    ({"mixing": ["paper"]}, "mixing is"),
    ({"compute_dtype": "load"}, "compute_dtype is 'load'; choose one of"),
    ({"compute_dtype": "x" * 10**6}, "compute_dtype is 'xxx"),
    ({"downsample_norm": 1}, "downsample_norm is 1; give true or false"),
    ({"inference_mode": "yes"}, "inference_mode is 'yes'; give true or false"),
    ({"modules_to_save": [""]}, "modules_to_save holds ''"),
    ({"modules_to_save": ["model"]}, "modules_to_save names model, part of the base"),
    ({"modules_to_save": ["ayers"]}, "modules_to_save names ayers, part of the base"),
    ({"modules_to_save": ["mix"]}, "modules_to_save names mix, (which this base does not have|part of the base)"),
    ({"modules_to_save": ["default"]}, "modules_to_save names default, (which|part)"),
    ({"modules_to_save": ["x"] * 10**5}, "modules_to_save is"),
    ({"modules_to_save": [7]}, "modules_to_save holds 7"),
    ({"modules_to_save": ["lm_head"]}, "lacks base_model.model.lm_head.weight"),
    ({"target_modules": [["x"]]}, "target_modules holds"),
    ({"trainable_token_indices": [0] * 10**5}, "trainable_token_indices is"),
    ({"base_model_name_or_path": ["a", "b"]}, "base_model_name_or_path is"),
    ({"base_model_name_or_path": "a\nb"}, r"base_model_name_or_path is 'a\\nb'; give one line"),
    ({"base_model_name_or_path": "x" * 10**6}, "base_model_name_or_path is"),
    ({"revision": {"a": 1}}, "revision is"),
    ({"peft_version": 21}, "peft_version is 21"),
    ({"tokenizer_fingerprint": 7}, "tokenizer_fingerprint is 7"),
    ({"task_type": "CODE"}, "Invalid task type: 'CODE'"),
    ({"reduction_factor": 8}, "has shape|lacks"),
    ({"downsample": "avgpool"}, "down.weight"),
    ({"layers_to_transform": [0, 1]}, "lacks"),
    ({"side_attention": True}, "lacks"),
    ({"tap_every": 1}, "lacks"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), CONFIGS)
def test_configs_that_are_refused(values: Fields, message: str, folder: Path) -> None:
    edit_config(folder, **values)
    assert_refused(folder, message)


def test_a_list_too_long_is_not_walked_through() -> None:
    with pytest.raises(ValueError, match=r"layers_to_transform is range\(0, 1000000000000\); give distinct"):
        SideTuningConfig(layers_to_transform=range(HUGE))


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"import os",
    "cut off": b'{"peft_type": "QST", "r"',
    "not UTF-8": b"\xff\xfe{}",
    "deeply nested": b'{"peft_type": "QST", "reduction_factor": ' + b"[" * 200_000,
    "number too long": b'{"peft_type": "QST", "reduction_factor": ' + b"9" * 10_000 + b"}",
    "a list": b'["QST"]',
    "a number": b"7",
    "no type": b'{"reduction_factor": 4}',
    "another type": b'{"peft_type": "os.system"}',
    "type no text": b'{"peft_type": {"a": 1}}',
    "names of Python's own": b'{"peft_type": "QST", "self": 1, "cls": 2}',
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_no_config(name: str, folder: Path) -> None:
    """PEFT reads these before it knows whose they are: the words are its own."""
    (folder / CONFIG).write_bytes(NOT_JSON[name])
    assert_refused(folder, "", (ValueError, TypeError, LookupError, RecursionError))


def test_what_a_config_cannot_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of code, further models and unknown fields have no effect."""
    (folder / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(folder))
    edit_config(
        folder, auto_mapping={"parent_library": "evil", "base_model_class": "Model"}, task_type=None, future="x",
        runtime_config={"code": "evil"}, trust_remote_code=True, origin="evil", model_id="evil/model",
        target_modules=".*", _target="evil.Model", __class__="evil.Model",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*trust_remote_code"):
        config = PeftConfig.from_pretrained(folder)
    assert config.auto_mapping is None
    assert not hasattr(config, "trust_remote_code")
    with pytest.raises(ValueError, match="Cannot infer the auto class"):
        AutoPeftModel.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny(), folder)
    assert model.peft_config["default"].target_modules == ["model.norm"]
    assert torch.equal(model(token_ids()).logits, side_tuned()(token_ids()).logits)


def test_values_that_are_missing_are_the_defaults(folder: Path) -> None:
    (folder / CONFIG).write_text('{"peft_type": "QST", "reduction_factor": 4}')
    for way in WAYS:
        way(folder)[1]()


def test_nothing_trusts_remote_code() -> None:
    root = Path(__file__).parents[1]
    files = [file for folder in ("qtuning_peft", "integrations", "recipes") for file in (root / folder).rglob("*.*")]
    texts = {file: file.read_text() for file in files if file.suffix in (".py", ".yaml")}
    assert not [file for file, text in texts.items() if re.search(r"trust_remote_code\W+true", text, re.IGNORECASE)]


def test_a_config_as_a_template_needs_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    for config in (PeftConfig.from_pretrained(folder), SideTuningConfig.from_pretrained(folder)):
        config.reduction_factor = 8
        assert get_peft_model(tiny(), config).peft_config["default"].reduction_factor == 8
    config = PeftConfig.from_pretrained(folder)
    tiny().add_adapter(config)


# -- base and tokenizer --------------------------------------------------------------------------------------------


def other_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["another"])
    return tokenizer


def test_what_is_recorded_of_the_base(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert recorded["base_model_name_or_path"] == str(tmp_path / "base")
    assert recorded["revision"] is None
    assert (recorded["base_hidden_size"], recorded["base_num_layers"]) == (64, 3)
    fingerprint = recorded["tokenizer_fingerprint"]
    assert fingerprint == safe_loading.tokenizer_fingerprint(str(tmp_path / "base"))
    assert len(fingerprint) == 16

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")

    shutil.copytree(tmp_path / "base", tmp_path / "another")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "another")
    with pytest.warns(UserWarning, match=f"trained on {tmp_path}/base and is loaded on {tmp_path}/another"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")

    other_tokenizer().save_pretrained(tmp_path / "adapter")
    other = safe_loading.tokenizer_fingerprint(str(tmp_path / "adapter"))
    assert other != fingerprint
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(
        UserWarning, match=f"{fingerprint} recorded .*{other} saved beside it, {fingerprint} of the base"
    ):
        PeftModel.from_pretrained(base, tmp_path / "adapter")


def test_a_fingerprint_is_of_the_vocabulary_alone(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer("w1 w2", padding="max_length", max_length=8, truncation=True)
    tokenizer.save_pretrained(tmp_path / "padded")
    files = [(tmp_path / name / "tokenizer.json").read_text() for name in ("plain", "padded")]
    assert files[0] != files[1]
    plain, padded = (safe_loading.tokenizer_fingerprint(str(tmp_path / name)) for name in ("plain", "padded"))
    assert plain == padded is not None


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"7", b"[" * 200_000, b'{"model": {"vocab": 7}}', b'{"model": {"vocab": {"a": "b"}}}',
     b'{"model": {"vocab": [[[]]]}}', b'{"model": {"vocab": {}}, "added_tokens": [7]}', b"\xff"],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_says_nothing(content: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert safe_loading.tokenizer_fingerprint(str(folder)) is None
    PeftModel.from_pretrained(tiny(), folder)


# -- properties ------------------------------------------------------------------------------------------------------

few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)
valid_options = st.fixed_dictionaries(
    {},
    optional={
        "reduction_factor": st.integers(2, 2**20),
        "downsample": st.sampled_from(list(DOWNSAMPLERS)),
        "downsample_rank": st.integers(1, 2**20),
        "downsample_norm": st.booleans(),
        "num_side_heads": st.none() | st.integers(1, 2**20),
        "side_attention": st.booleans(),
        "tap_every": st.integers(1, 2**20),
        "layers_to_transform": st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99), min_size=1, unique=True),
        "side_dropout": st.floats(0, 1, exclude_max=True),
        "mixing": st.sampled_from(list(MIXINGS)),
        "compute_dtype": st.sampled_from(list(COMPUTE_DTYPES)),
        "modules_to_save": st.none() | st.lists(names),
        "base_model_name_or_path": st.none() | names,
        "revision": st.none() | names,
        "tokenizer_fingerprint": st.none() | names,
        "task_type": st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS"]),
    },
).map(lambda options: options | ({"side_attention": True} if options.get("num_side_heads") else {}))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = sorted(set(SideTuningConfig().to_dict()) - {"peft_type"})


@few
@given(options=valid_options)
def test_every_valid_config_is_read_as_it_was_written(options: Fields) -> None:
    config = SideTuningConfig(**options)
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        for kind in (PeftConfig, SideTuningConfig):
            assert kind.from_pretrained(place).to_dict() == config.to_dict()


@settings(few, max_examples=50)
@given(changes=st.dictionaries(st.sampled_from(fields) | names, json_values, min_size=1, max_size=3))
def test_any_config_is_loaded_or_refused(good: Path, changes: Fields) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(good, Path(place, "adapter"))
        edit_config(folder, **changes)
        model = loaded_or_refused(folder)
    assert model is None or bool(torch.isfinite(model(token_ids()).logits).all())


@few
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0, 1e4), dtypes=st.lists(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), min_size=1, max_size=5))  # fmt: skip
def test_every_valid_tensor_is_loaded_as_it_was_written(
    good: Path, seed: int, scale: float, dtypes: list[torch.dtype]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    written = {
        key: (torch.rand(tensor.shape, generator=generator) * scale).to(dtypes[index % len(dtypes)])
        for index, (key, tensor) in enumerate(load_file(good / WEIGHTS).items())
    }
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(good, Path(place, "adapter"))
        save_file(written, folder / WEIGHTS)
        state = PeftModel.from_pretrained(tiny(), folder).state_dict()
    for key, tensor in written.items():
        assert torch.equal(state[PREFIX + "default." + key.removeprefix(PREFIX)], tensor.float())


@settings(few, max_examples=50)
@given(data=st.data())
def test_any_damage_to_a_file_is_found_or_harmless(good: Path, data: st.DataObject) -> None:
    content = bytearray((good / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        # The header is where it hurts, and a small part of the file.
        place = data.draw(st.integers(0, header) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(good, Path(place, "adapter"))
        (folder / WEIGHTS).write_bytes(content)
        model = loaded_or_refused(folder)
    assert model is None or all(bool(torch.isfinite(p).all()) for p in model.parameters())
