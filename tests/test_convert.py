"""The conversion script: adapters with the logits of the QST authors' formulas, from files such as their code saves.

The reference is written from those formulas (ACL 2024, and what the authors' code adds to them) in plain float64
tensors, under the authors' names, and shares no code with the package:

    D_i(h) = LayerNorm(B_i silu(A_i h))      g_0 = D_0(e)      g_i = block_i((1 - z_i) D_i(h_i) + z_i g_(i-1))
    logits = W_head (s f + (1 - s) (U norm(g_N) + u))      z, s behind a sigmoid; for OPT s and 1 - s change places
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny, token_ids
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import layer_norm, silu
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from typer import Typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from convert_checkpoint import convert_checkpoint, main

R, RANK, HEADS = 4, 8, 4
Checkpoint = dict[str, dict[str, Tensor] | Tensor]


def shapes(config: PretrainedConfig) -> dict[str, dict[str, tuple[int, ...]] | tuple[int, ...]]:
    """Files of the authors' checkpoint and the shapes in them."""
    d, layers = config.hidden_size, range(config.num_hidden_layers)
    w = d // R
    opt = config.model_type == "opt"
    inner = (config.ffn_dim if opt else config.intermediate_size) // R

    def norm(name: str, bias: bool = opt) -> dict[str, tuple[int, ...]]:
        return {f"{name}weight": (w,)} | ({f"{name}bias": (w,)} if bias else {})

    def linear(name: str, out: int, into: int, bias: bool = opt) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})

    block: dict[str, tuple[int, ...]] = {}
    if opt:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            block |= linear(f"self_attn.{name}", w, w)
        block |= norm("self_attn_layer_norm.") | norm("final_layer_norm.")
        block |= linear("fc1", inner, w) | linear("fc2", w, inner)
    else:
        kv = config.num_key_value_heads * (w // HEADS)
        for name, rows in (("q_proj", w), ("k_proj", kv), ("v_proj", kv), ("o_proj", w)):
            block |= linear(f"self_attn.{name}", rows, w)
        block |= norm("input_layernorm.") | norm("post_attention_layernorm.")
        block |= linear("mlp.gate_proj", inner, w) | linear("mlp.up_proj", inner, w) | linear("mlp.down_proj", w, inner)
    tap = linear("adapter_A", RANK, d, False) | linear("adapter_B", w, RANK, False) | norm("post_layer_norm.", True)
    return {
        "qst_layers_parameters.pt": {f"{i}.{name}": shape for i in layers for name, shape in block.items()},
        "qst_z_parameters.pt": {str(i): (w,) for i in layers},
        "qst_downsample_parameters.pt": {f"{i}.{name}": shape for i in layers for name, shape in tap.items()},
        "qst_norm_parameters.pt": norm(""),
        "qst_upsample_parameters.pt": {"weight": (d, w), "bias": (d,)},
        "lm_head_z_parameters.pt" if opt else "lm_head_z_path.pt": (d,),
    }


def checkpoint(config: PretrainedConfig, without_tap_norm: bool = False) -> Checkpoint:
    """Random tensors that a float32 holds exactly, none near its start."""
    generator = torch.Generator().manual_seed(5)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 1.0)

    files: Checkpoint = {}
    for file, content in shapes(config).items():
        if isinstance(content, tuple):
            files[file] = torch.nn.Parameter(draw(content))
        else:
            files[file] = {
                key: draw(shape) for key, shape in content.items() if not (without_tap_norm and "post_layer" in key)
            }
    return files


def save(files: Checkpoint, folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        torch.save(content, folder / name)
    return folder


def reference(
    base: PreTrainedModel, files: Checkpoint, input_ids: Tensor, attention_mask: Tensor, positions: dict[str, Tensor]
) -> Tensor:
    """The authors' logits, in float64, as `base` is."""
    config = base.config
    opt, eps = config.model_type == "opt", 1e-5 if config.model_type == "opt" else config.rms_norm_eps
    length, size = input_ids.shape[1], config.hidden_size // R // HEADS
    t = {
        f"{file.split('_')[1]}.{key}": tensor.double()
        for file, content in files.items()
        for key, tensor in (content.items() if isinstance(content, dict) else [("", content)])
    }  # "layers.0.fc1.weight", "z.0", "downsample.0.adapter_A.weight", "norm.weight", "upsample.bias", "head."

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", torch.zeros(()))

    def norm(name: str, x: Tensor) -> Tensor:
        if opt:
            return layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * t[f"{name}.weight"]

    def down(i: int, h: Tensor) -> Tensor:
        name = f"downsample.{i}"
        y = linear(f"{name}.adapter_B", silu(linear(f"{name}.adapter_A", h)))
        if f"{name}.post_layer_norm.weight" not in t:
            return y
        return layer_norm(y, y.shape[-1:], t[f"{name}.post_layer_norm.weight"], t[f"{name}.post_layer_norm.bias"], 1e-5)

    scale = 1.0 if opt else config.rope_parameters.get("factor", 1.0)
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = positions["position_ids"][:, None, :, None] / scale * frequencies
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def rotate(x: Tensor) -> Tensor:
        if opt:
            return x
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    seen = torch.ones(length, length, dtype=torch.bool).tril() & (attention_mask[:, None, None] == 1)
    # Without it, the softmax of a padded query is not defined; nothing reads its result.
    seen = seen | torch.eye(length, dtype=torch.bool)

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = (
            linear(f"{name}.{part}_proj", x).unflatten(-1, (-1, size)).transpose(1, 2) for part in ("q", "k", "v")
        )
        k, v = (part.repeat_interleave(HEADS // part.shape[1], 1) for part in (k, v))
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(size)
        out = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        return linear(f"{name}.{'out_proj' if opt else 'o_proj'}", out.transpose(1, 2).flatten(-2))

    def block(i: int, x: Tensor) -> Tensor:
        name = f"layers.{i}"
        if opt:
            x = x + attention(f"{name}.self_attn", norm(f"{name}.self_attn_layer_norm", x))
            return x + linear(f"{name}.fc2", linear(f"{name}.fc1", norm(f"{name}.final_layer_norm", x)).relu())
        x = x + attention(f"{name}.self_attn", norm(f"{name}.input_layernorm", x))
        y = norm(f"{name}.post_attention_layernorm", x)
        gated = silu(linear(f"{name}.mlp.gate_proj", y)) * linear(f"{name}.mlp.up_proj", y)
        return x + linear(f"{name}.mlp.down_proj", gated)

    decoder = base.model.decoder if opt else base.model
    taps: list[Tensor] = []
    hooks = [decoder.layers[0].register_forward_pre_hook(lambda _, args: taps.append(args[0]))]
    hooks += [layer.register_forward_hook(lambda _, args, output: taps.append(output)) for layer in decoder.layers]
    with torch.no_grad():
        f = decoder(input_ids, attention_mask=attention_mask, **positions).last_hidden_state
        for hook in hooks:
            hook.remove()
        g = down(0, taps[0])
        for i, h in enumerate(taps[1:]):
            z = t[f"z.{i}"].sigmoid()
            g = block(i, (1 - z) * down(i, h) + z * g)
        s, up = t["head."].sigmoid(), linear("upsample", norm("norm", g))
        mixed = s * up + (1 - s) * f if opt else (1 - s) * up + s * f
        return base.get_output_embeddings()(mixed)


class Float64Rotary(torch.nn.Module):
    """Llama's rotary table; transformers computes it in float32 whatever the dtype of the model."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        size = config.hidden_size // config.num_attention_heads
        scale = config.rope_parameters.get("factor", 1.0)
        self.inv_freq = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size) / scale

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.cat([position_ids[..., None] * self.inv_freq] * 2, -1)
        return angle.cos(), angle.sin()


def difference(folder: Path, files: Checkpoint) -> float:
    """The largest one between logits of the adapter, loaded with plain PEFT, and of the formulas, over real tokens."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base").double().eval()
    if base.config.model_type == "llama":
        base.model.rotary_emb = Float64Rotary(base.config)
    input_ids, attention_mask = token_ids(), torch.ones(2, 12, dtype=torch.int64)
    attention_mask[1, :3] = 0
    # Positions are counted without padding by the authors' `generate`, and by ours.
    positions = {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
    expected = reference(base, files, input_ids, attention_mask, positions)
    model = PeftModel.from_pretrained(base, folder / "adapter").double()
    with torch.no_grad():
        actual = model(input_ids=input_ids, attention_mask=attention_mask, **positions).logits
        plain = model.get_base_model()  # the side network must matter, or nothing was compared
        with model.disable_adapter():
            assert (plain(input_ids, attention_mask=attention_mask, **positions).logits - actual).abs().max() > 0.1
    return float((actual - expected).abs()[attention_mask == 1].max())


def prepared(folder: Path, family: str, without_tap_norm: bool = False, **overrides: object) -> Checkpoint:
    """Save a base and a checkpoint in folders of these names."""
    base = tiny(family, **overrides)
    base.save_pretrained(folder / "base")
    files = checkpoint(base.config, without_tap_norm)
    save(files, folder / "checkpoint")
    return files


def convert_in(folder: Path) -> None:
    convert_checkpoint(folder / "checkpoint", folder / "base", folder / "adapter")


CASES = [
    pytest.param("opt", False, {}, id="opt"),
    pytest.param("opt", True, {}, id="opt without the norm of the down-samplers"),
    pytest.param("llama", True, {}, id="llama without the norm of the down-samplers"),
    pytest.param("llama", False, {}, id="llama"),
    pytest.param("llama", False, {"num_key_value_heads": 4}, id="no shared keys"),
    pytest.param("llama", False, {"num_key_value_heads": 1}, id="one key head"),
    pytest.param(
        "llama", False, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, id="linear"
    ),
]


@pytest.mark.parametrize(("family", "without_tap_norm", "overrides"), CASES)
def test_logits_are_those_of_the_authors_formulas(
    family: str, without_tap_norm: bool, overrides: dict[str, object], tmp_path: Path
) -> None:
    files = prepared(tmp_path, family, without_tap_norm, **overrides)
    convert_in(tmp_path)
    assert difference(tmp_path, files) < 1e-9


def test_the_adapter_names_its_base_and_what_it_is(tmp_path: Path) -> None:
    prepared(tmp_path, "opt")
    config = convert_checkpoint(tmp_path / "checkpoint", str(tmp_path / "base"), tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == config.base_model_name_or_path == str(tmp_path / "base")
    expected = {
        "reduction_factor": R,
        "downsample": "adapter",
        "downsample_rank": RANK,
        "num_side_heads": HEADS,
        "mixing": "reference",
    }
    expected |= {"base_hidden_size": 64, "base_num_layers": 3, "task_type": "CAUSAL_LM", "inference_mode": True}
    assert {key: saved[key] for key in expected} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "checkpoint"]


def test_a_checkpoint_in_bfloat16_stays_exact(tmp_path: Path) -> None:
    files = prepared(tmp_path, "opt")
    rounded: Checkpoint = {
        name: {key: tensor.bfloat16() for key, tensor in content.items()} if isinstance(content, dict) else content
        for name, content in files.items()
    }
    for name, content in rounded.items():
        torch.save(content, tmp_path / "checkpoint" / name)
    convert_in(tmp_path)
    assert difference(tmp_path, rounded) < 1e-9


def refused(folder: Path, match: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=match):
        convert_in(folder)
    assert sorted(folder.rglob("*")) == before


class Payload:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("name", ["qst_layers_parameters.pt", "lm_head_z_parameters.pt"])
@pytest.mark.parametrize("inside", [False, True])
def test_code_in_a_file_is_refused_and_never_run(name: str, inside: bool, tmp_path: Path) -> None:
    prepared(tmp_path, "opt")
    victim = tmp_path / "victim"
    payload = Payload(victim)
    torch.save({"0.fc1.weight": payload} if inside else payload, tmp_path / "checkpoint" / name)
    refused(tmp_path, f"{name} does not load as tensors alone")
    assert not victim.exists()


@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    prepared(tmp_path, "opt")
    path = tmp_path / "checkpoint" / "qst_layers_parameters.pt"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, "qst_layers_parameters.pt does not load as tensors alone")


def test_missing_files_are_named(tmp_path: Path) -> None:
    prepared(tmp_path, "opt")
    (tmp_path / "checkpoint" / "qst_z_parameters.pt").unlink()
    (tmp_path / "checkpoint" / "qst_norm_parameters.pt").unlink()
    refused(tmp_path, r"lacks qst_z_parameters\.pt, qst_norm_parameters\.pt, of the 6 files")


def test_a_llama_checkpoint_is_not_taken_for_one_of_opt(tmp_path: Path) -> None:
    prepared(tmp_path, "llama")
    tiny("opt").save_pretrained(tmp_path / "base")
    refused(tmp_path, r"lacks lm_head_z_parameters\.pt")


CHANGES = [
    ("qst_layers_parameters.pt", {"1.fc1.bias": None}, r"lacks 1\.fc1\.bias in qst_layers_parameters\.pt"),
    ("qst_z_parameters.pt", {"3": torch.zeros(16)}, r"3 in qst_z_parameters\.pt left over"),
    ("qst_downsample_parameters.pt", {"0.adapter_A.bias": torch.zeros(RANK)}, r"0\.adapter_A\.bias .* left over"),
    ("qst_downsample_parameters.pt", {"0.adapter_B.weight": None}, "which give the widths"),
    ("qst_downsample_parameters.pt", {"0.adapter_B.weight": torch.zeros(24, RANK)}, "is 24 wide"),
    ("qst_downsample_parameters.pt", {"0.adapter_B.weight": torch.zeros(0, RANK)}, "is 0 wide"),
    (
        "qst_layers_parameters.pt",
        {"0.fc1.weight": torch.zeros(8, 16)},
        r"shape \(8, 16\), and this base needs \(32, 16\)",
    ),
    ("qst_norm_parameters.pt", {"bias": torch.full((16,), math.nan)}, "not finite"),
    (
        "qst_norm_parameters.pt",
        {"bias": torch.zeros(16, dtype=torch.int64)},
        "bias in qst_norm_parameters.pt is no tensor",
    ),
    ("qst_norm_parameters.pt", {"bias": torch.zeros(16).to_sparse()}, "bias in qst_norm_parameters.pt is no tensor"),
    ("qst_norm_parameters.pt", {"bias": [0.0]}, "bias in qst_norm_parameters.pt is no tensor"),
]


@pytest.mark.parametrize(("name", "changes", "match"), CHANGES)
def test_tensors_that_do_not_fit_are_named(name: str, changes: dict[str, object], match: str, tmp_path: Path) -> None:
    content = prepared(tmp_path, "opt")[name]
    assert isinstance(content, dict)
    changed = {key: value for key, value in (content | changes).items() if value is not None}
    torch.save(changed, tmp_path / "checkpoint" / name)
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("family", "overrides", "match"),
    [
        ("opt", {"num_hidden_layers": 4}, r"lacks 3 in qst_z_parameters\.pt|lacks 3\.adapter_A"),
        ("opt", {"hidden_size": 128, "word_embed_proj_dim": 128}, "this base needs"),
        ("opt", {"do_layer_norm_before": False}, "no norm behind its 3 blocks"),
        ("mistral", {}, "type mistral, and the authors' code trains llama and opt only"),
    ],
)
def test_another_base_is_refused(family: str, overrides: dict[str, object], match: str, tmp_path: Path) -> None:
    prepared(tmp_path, "opt")
    tiny(family, **overrides).save_pretrained(tmp_path / "base")
    refused(tmp_path, match)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        {"head_dim": 32},
    ],
)
def test_positions_that_the_authors_side_network_has_not_are_refused(
    overrides: dict[str, object], tmp_path: Path
) -> None:
    prepared(tmp_path, "llama", **overrides)
    refused(tmp_path, "rope_theta 10000 whatever the base has")


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    prepared(tmp_path, "opt")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes").write_text("mine")
    refused(tmp_path, "not an empty folder")
    assert (tmp_path / "adapter" / "notes").read_text() == "mine"


def test_the_command(tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "base"), "--output", str(tmp_path / "adapter")]
    files = prepared(tmp_path, "opt")
    finished = CliRunner().invoke(app, arguments)
    assert finished.exit_code == 0, finished.output
    assert "reduction_factor 4, 3 side blocks with 4 heads" in finished.output
    assert difference(tmp_path, files) < 1e-9
    refusal = CliRunner().invoke(app, arguments)
    assert refusal.exit_code == 1
    assert "Error:" in refusal.output
    assert "Traceback" not in refusal.output
