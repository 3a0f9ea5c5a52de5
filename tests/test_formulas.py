"""The side network against its equations in float64, its initial values and its first gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import EVERY_PART
from float64_reference import Array, Setup, default_heads, relu, side_network, silu
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qtuning_peft import SideTuningConfig

FAMILIES = ("llama", "opt")
DOWNSAMPLES = ("adapter", "lora", "linear", "projection", "maxpool", "avgpool")
MIXINGS = ("additive", "paper", "reference")
TOLERANCE = 1e-9
DEFAULTS: dict[str, Any] = {"reduction_factor": 4, "downsample_rank": 6, **EVERY_PART}
FLOAT32_TOLERANCE = 1e-4

VOCAB = 40
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = SIZES | {
    "intermediate_size": 100,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.2,
}
OPT = SIZES | {"ffn_dim": 100, "max_position_embeddings": 64, "init_std": 0.2}
PREFIX = {
    "llama": "base_model.model.model.norm.qst_side_network.default.",
    "opt": "base_model.model.model.decoder.final_layer_norm.qst_side_network.default.",
}


class Float64Rotary(LlamaRotaryEmbedding):
    """Llama's rotary table; transformers computes it in float32 whatever the dtype of the model."""

    def __init__(self, config: LlamaConfig, frequencies: Array) -> None:
        super().__init__(config)
        self.inv_freq = torch.from_numpy(frequencies)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def base_frequencies(config: LlamaConfig) -> Array:
    return config.rope_parameters["rope_theta"] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)


def build_base(family: str, **overrides: Any) -> PreTrainedModel:
    """A base whose weights are large enough for its hidden states and logits to be of order one."""
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**(LLAMA | overrides))).eval()
    config = OPT | overrides
    return OPTForCausalLM(OPTConfig(word_embed_proj_dim=config["hidden_size"], **config)).eval()


def build_float64_base(family: str, frequencies: Array | None = None, **overrides: Any) -> PreTrainedModel:
    base = build_base(family, **overrides).double()
    if family == "llama":
        chosen = base_frequencies(base.config) if frequencies is None else frequencies
        base.model.rotary_emb = Float64Rotary(base.config, chosen)
    return base


def decoder_of(family: str, base: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """The blocks and the final norm."""
    if family == "llama":
        return base.model.layers, base.model.norm
    return base.model.decoder.layers, base.model.decoder.final_layer_norm


@dataclass
class Trace:
    hidden_states: list[Array]
    f: Array
    logits: Array
    eps: float


def first(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


@torch.no_grad()
def trace(family: str, base: PreTrainedModel, **inputs: Tensor) -> Trace:
    """What the base computes on its own, before it is adapted."""
    layers, final_norm = decoder_of(family, base)
    seen: list[Tensor] = []
    hooks = [
        layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    for module in (*layers, final_norm):
        hooks.append(module.register_forward_hook(lambda module, args, output: seen.append(first(output))))
    logits = base(**inputs).logits
    for hook in hooks:
        hook.remove()
    *hidden_states, f = (state.double().numpy() for state in seen)
    assert len(hidden_states) == len(layers) + 1
    eps = final_norm.variance_epsilon if family == "llama" else final_norm.eps
    return Trace(hidden_states, f, logits.double().numpy(), eps)


def side_tensors(family: str, model: nn.Module) -> dict[str, Tensor]:
    prefix = PREFIX[family]
    return {name.removeprefix(prefix): t for name, t in model.state_dict().items() if name.startswith(prefix)}


def side_parameters(family: str, model: nn.Module) -> dict[str, nn.Parameter]:
    prefix = PREFIX[family]
    return {name.removeprefix(prefix): p for name, p in model.named_parameters() if name.startswith(prefix)}


@torch.no_grad()
def randomize(family: str, model: nn.Module) -> None:
    """No tensor keeps an initial value that would hide the term it stands in."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in side_tensors(family, model).items():
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.ndim == 2:
            values *= 1.5 / tensor.shape[1] ** 0.5
        elif name.endswith("norm.weight"):
            values = 1.0 + 0.5 * values
        tensor.copy_(values)


def random_inputs(batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    # From 3 on: none is a special token of either family.
    return {"input_ids": torch.randint(3, VOCAB, (batch, length), generator=generator)}


def padded_inputs(side: str) -> dict[str, Tensor]:
    inputs = random_inputs(batch=3, length=8)
    lengths = torch.tensor([[8], [5], [1]])
    steps = torch.arange(8)
    real = steps < lengths if side == "right" else steps >= 8 - lengths
    return inputs | {"attention_mask": real.long()}


def adapt(base: PreTrainedModel, **config: Any) -> peft.PeftModel:
    return peft.get_peft_model(base, SideTuningConfig(**(DEFAULTS | config))).eval()


def tapped(depth: int, every: int) -> list[int]:
    """The last block, and every n-th before it."""
    return [i for i in range(depth) if (depth - 1 - i) % every == 0]


def expected_logits(
    family: str, base: PreTrainedModel, model: nn.Module, traced: Trace, inputs: dict[str, Tensor], **config: Any
) -> Array:
    d, r = base.config.hidden_size, config.get("reduction_factor", 4)
    batch, length = inputs["input_ids"].shape
    positions = inputs.get("position_ids", torch.arange(length).expand(batch, length))
    llama = family == "llama"
    setup = Setup(
        r=r,
        downsample=config.get("downsample", "linear"),
        downsample_norm=config.get("downsample_norm", True),
        mixing=config.get("mixing", "paper"),
        num_heads=config.get("num_side_heads") or default_heads(d // r),
        layers=config.get("layers_to_transform") or tapped(base.config.num_hidden_layers, config.get("tap_every", 1)),
        eps=traced.eps,
        act=silu if llama and base.config.hidden_act == "silu" else relu,
        gated=llama,
        frequencies=base.model.rotary_emb.inv_freq.double().numpy() if llama else None,
        positions=positions.numpy(),
    )
    mask = inputs.get("attention_mask", torch.ones(batch, length, dtype=torch.long))
    arrays = {name: tensor.double().numpy() for name, tensor in side_tensors(family, model).items()}
    h = side_network(arrays, traced.hidden_states, traced.f, mask.numpy(), setup)
    return h @ base.lm_head.weight.detach().double().numpy().T


def difference(family: str, base: PreTrainedModel, inputs: dict[str, Tensor], **config: Any) -> float:
    """The largest difference from the reference in any logit of a real token, of an adapter with random tensors."""
    traced = trace(family, base, **inputs)
    model = adapt(base, **config).to(base.dtype)
    randomize(family, model)
    with torch.no_grad():
        actual = model(**inputs).logits.double().numpy()
    expected = expected_logits(family, base, model, traced, inputs, **config)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool().numpy()
    # If the side network hardly moved the logits, the difference would say little about it.
    assert np.abs(expected - traced.logits)[real].max() > 0.1
    return float(np.abs(actual - expected)[real].max())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_downsamplers(family: str, downsample: str, norm: bool) -> None:
    base = build_float64_base(family)
    assert difference(family, base, random_inputs(), downsample=downsample, downsample_norm=norm) < TOLERANCE


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixings(family: str, mixing: str) -> None:
    assert difference(family, build_float64_base(family), random_inputs(), mixing=mixing) < TOLERANCE


@pytest.mark.parametrize("layers", [[0], [2], [3, 1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_tapped_layers(family: str, layers: list[int]) -> None:
    base = build_float64_base(family, num_hidden_layers=4)
    assert difference(family, base, random_inputs(), layers_to_transform=layers) < TOLERANCE


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_attention_beside_every_nth_block(family: str, every: int, mixing: str) -> None:
    base = build_float64_base(family, num_hidden_layers=5)
    config = {"tap_every": every, "side_attention": False, "mixing": mixing}
    assert difference(family, base, random_inputs(), **config) < TOLERANCE


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_side_heads(family: str, heads: int) -> None:
    assert difference(family, build_float64_base(family), random_inputs(), num_side_heads=heads) < TOLERANCE


@pytest.mark.parametrize(
    ("width", "heads"), [(16, 1), (66, 1), (126, 1), (128, 2), (130, 1), (132, 2), (192, 3), (200, 2), (256, 4)]
)
def test_default_side_heads(width: int, heads: int) -> None:
    assert default_heads(width) == heads
    base = build_float64_base("opt", hidden_size=2 * width, num_hidden_layers=1, num_attention_heads=2)
    assert difference("opt", base, random_inputs(), reduction_factor=2) < TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family: str, side: str) -> None:
    assert difference(family, build_float64_base(family), padded_inputs(side), num_side_heads=2) < TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_with_eager_attention(family: str, side: str) -> None:
    # In float32: the library's eager softmax turns a float64 row that is masked throughout into NaN.
    base = build_base(family, attn_implementation="eager")
    assert difference(family, base, padded_inputs(side), num_side_heads=2) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_left_padding(family: str) -> None:
    inputs = padded_inputs("left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert difference(family, build_float64_base(family), inputs, num_side_heads=2) < TOLERANCE


@pytest.mark.parametrize(
    "positions",
    [
        [[0, 1, 2, 3, 4, 5, 5], [5, 9, 13, 20, 21, 40, 41]],
        [[3, 4, 6, 9, 13, 18, 24]],  # the same for both sequences
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_positions(family: str, positions: list[list[int]]) -> None:
    inputs = random_inputs() | {"position_ids": torch.tensor(positions)}
    assert difference(family, build_float64_base(family), inputs, num_side_heads=2) < TOLERANCE


@pytest.mark.parametrize(
    ("r", "heads", "head_dim"),
    [
        (4, 2, 16),  # 6 of 8 frequencies, not evenly spaced
        (4, 4, 32),  # 3 of 16
        (2, 2, 16),  # all 8, and 8 of 24 channels left alone
        (2, 1, 24),  # all 12, and half the channels left alone
        (3, 1, 32),  # all 16, and every channel turned
    ],
)
def test_rotary_frequencies(r: int, heads: int, head_dim: int) -> None:
    base = build_float64_base("llama", hidden_size=96, head_dim=head_dim)
    assert difference("llama", base, random_inputs(length=9), reduction_factor=r, num_side_heads=heads) < TOLERANCE


def test_rotary_of_arbitrary_frequencies() -> None:
    # Long-context variants scale the frequencies unevenly; the side network takes those of the base as they are.
    frequencies = np.random.default_rng(0).uniform(0.1, 2.0, size=8)
    base = build_float64_base("llama", frequencies=frequencies)
    assert difference("llama", base, random_inputs(), num_side_heads=2) < TOLERANCE


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}])
def test_rotary_of_the_library(rope: dict[str, Any]) -> None:
    base = build_base("llama", rope_parameters={"rope_theta": 10000.0} | rope).double()
    factor = rope.get("factor", 1.0)
    np.testing.assert_allclose(base.model.rotary_emb.inv_freq, base_frequencies(base.config) / factor, rtol=1e-6)
    # The library's table is float32.
    assert difference("llama", base, random_inputs(), num_side_heads=2) < FLOAT32_TOLERANCE


def test_eps_of_the_base() -> None:
    base = build_float64_base("opt")
    base.model.decoder.final_layer_norm.eps = 0.5
    assert difference("opt", base, random_inputs()) < TOLERANCE


def test_activation_of_the_base() -> None:
    base = build_float64_base("llama", hidden_act="relu")
    assert difference("llama", base, random_inputs(), downsample="adapter") < TOLERANCE


def expected_shapes(family: str, downsample: str, norm: bool, mixing: str) -> dict[str, tuple[int, ...]]:
    """For the bases above with two tapped blocks, r = 4 and a rank of 6."""
    d, w, rank, inner = 64, 16, 6, 25
    llama = family == "llama"

    def linear(name: str, out_size: int, in_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
        weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (out_size, in_size)}
        return weight | {f"{name}.bias": (out_size,)} if bias else weight

    def normed(name: str, bias: bool = not llama) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (w,)} | ({f"{name}.bias": (w,)} if bias else {})

    shapes = normed("norm") | linear("mix.up_proj", d, w, True)
    if mixing == "additive":
        shapes["mix.correction.weight"] = (d, d)
    else:
        shapes["mix.weight"] = (1,) if mixing == "paper" else (d,)
    for tap in ("embedding_tap", "taps.0", "taps.1"):
        shapes[f"{tap}.center"] = (d,)
        if downsample == "linear":
            shapes |= {f"{tap}.down.weight": (w, d)}
        elif downsample in ("lora", "adapter", "projection"):
            last = 2 if downsample == "adapter" else 1
            shapes |= {f"{tap}.down.0.weight": (rank, d), f"{tap}.down.{last}.weight": (w, rank)}
        if norm:
            shapes |= normed(f"{tap}.norm", bias=not llama or mixing == "reference")
    for j in range(2):
        if mixing != "additive":
            shapes |= {f"gates.{j}.weight": (1,) if mixing == "paper" else (w,)}
        shapes |= normed(f"blocks.{j}.attention_norm") | normed(f"blocks.{j}.mlp_norm")
        shapes |= linear(f"blocks.{j}.attention.qkv_proj", 3 * w, w, not llama)
        shapes |= linear(f"blocks.{j}.attention.o_proj", w, w, not llama)
        shapes |= linear(f"blocks.{j}.mlp.up_proj", 2 * inner if llama else inner, w, not llama)
        shapes |= linear(f"blocks.{j}.mlp.down_proj", w, inner, not llama)
    return shapes


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors(family: str, downsample: str, mixing: str, norm: bool) -> None:
    # The reference reads from its tensors whether a norm has a bias, so their presence is checked here.
    config: dict[str, Any] = {"downsample": downsample, "mixing": mixing, "downsample_norm": norm}
    model = adapt(build_base(family, num_hidden_layers=2), **config)
    shapes = {name: tuple(tensor.shape) for name, tensor in side_tensors(family, model).items()}
    assert shapes == expected_shapes(family, downsample, norm, mixing)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_initial_values(family: str, mixing: str) -> None:
    tensors = side_tensors(family, adapt(build_base(family), mixing=mixing))
    starts = {"paper": torch.zeros(1), "reference": torch.full((16,), 0.5)}
    for j in range(3):
        assert torch.equal(tensors.get(f"gates.{j}.weight", torch.empty(0)), starts.get(mixing, torch.empty(0)))
    if mixing == "additive":
        assert not tensors["mix.correction.weight"].any()
        assert not tensors["mix.up_proj.weight"].any()
        assert not tensors["mix.up_proj.bias"].any()
    else:
        assert tensors["mix.up_proj.weight"].any()
        assert torch.equal(tensors["mix.weight"], torch.ones(1) if mixing == "paper" else torch.ones(64))
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif name.endswith("norm.bias"):
            assert not tensor.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
@pytest.mark.parametrize("mixing", ["additive", "paper"])
def test_a_fresh_adapter_is_the_base(mixing: str, family: str, dtype: torch.dtype) -> None:
    base, inputs = build_base(family).to(dtype), padded_inputs("left")
    before = base(**inputs).logits
    after = adapt(base, mixing=mixing)(**inputs).logits
    assert after.dtype == before.dtype
    assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_disabled_adapter_is_the_base(family: str, mixing: str, dtype: torch.dtype) -> None:
    base, inputs = build_base(family).to(dtype), padded_inputs("left")
    before = base(**inputs).logits
    model = adapt(base, mixing=mixing)
    randomize(family, model)
    enabled = model(**inputs).logits
    with model.disable_adapter():
        disabled = model(**inputs).logits
    assert disabled.dtype == before.dtype
    assert torch.equal(disabled, before)
    assert not torch.equal(enabled, before)
    assert torch.equal(model(**inputs).logits, enabled)


def backward(family: str, model: nn.Module) -> dict[str, bool]:
    """For each side tensor, whether the loss has a gradient with respect to it that is not zero."""
    model.zero_grad()
    ids = random_inputs()["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    side = side_parameters(family, model)
    owned = {id(p) for p in side.values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in owned)
    assert all(p.grad is None or p.grad.isfinite().all() for p in side.values())
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in side.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_first_gradients_of_paper(family: str) -> None:
    model = adapt(build_base(family), mixing="paper")
    assert {name for name, reached in backward(family, model).items() if reached} == {"mix.weight"}


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_first_gradients_of_additive(family: str, downsample: str) -> None:
    model = adapt(build_base(family), mixing="additive", downsample=downsample)
    reached = {name for name, reached in backward(family, model).items() if reached}
    assert reached == {"mix.up_proj.weight", "mix.up_proj.bias", "mix.correction.weight"}
    torch.optim.SGD(side_parameters(family, model).values(), lr=0.1).step()
    assert {name for name, reached in backward(family, model).items() if not reached} == set()
