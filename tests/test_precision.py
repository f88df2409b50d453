"""Whatever was done to the weights or their precision, guidance is right; and so are gradients through it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import stg_hooks as stg
from tests import zoo

EXECUTIONS = ("sequential", "batched", "full")
executions = pytest.mark.parametrize("execution", EXECUTIONS)
ONE_FAST = ["sequential", *(pytest.param(way, marks=pytest.mark.slow) for way in EXECUTIONS[1:])]
SCALE = 1.5


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    """A warning would say that something else was computed than asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", stg.StgWarning)
        yield


def textbook(model: nn.Module, weak: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Compute guidance by two plain passes, in float32."""
    cond, other = first(model(**inputs)), first(weak(**inputs))
    return (cond.float() + SCALE * (cond.float() - other.float())).to(cond.dtype)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def check(model: nn.Module, weak: nn.Module, inputs: dict[str, Any], layer: str, execution: str, **close: Any) -> None:
    """Compare three guided calls with the textbook, and the model afterwards with the one before."""
    expected, before = textbook(model, weak, inputs), zoo.snapshot(model)
    with stg.apply(model, [layer], SCALE, execution=execution):
        for _ in range(3):
            assert_close(first(model(**inputs)), expected, **close)
    assert zoo.snapshot(model) == before


# --- half precision ---------------------------------------------------------------------------------------------------


@executions
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["plain", "image_text", "unet", "two_stacks"])
def test_half_precision(name: str, dtype: torch.dtype, execution: str) -> None:
    """Predictions are what half precision gives; only the formula is computed in float32."""
    model = zoo.build(name).to(dtype)
    layer = zoo.ZOO[name].numbered[1]
    inputs = {key: value.to(dtype) for key, value in zoo.inputs(4).items()}
    check(model, zoo.without(model, [layer]), inputs, layer, execution, rtol=0.05, atol=0.05)


@executions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, execution: str) -> None:
    model = zoo.build("plain")
    with torch.autocast("cpu", dtype):
        check(model, zoo.without(model, ["blocks.2"]), zoo.inputs(4), "blocks.2", execution, rtol=0.05, atol=0.05)


class RoundsByRows(zoo.DiT):
    """Rounds otherwise in calls with other rows, as kernels for half precision do, and returns float32."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        dtype = self.embed.weight.dtype
        return super().forward(x.to(dtype), text.to(dtype)).float() * (1 + 0.004 * (len(x) == 4))


@pytest.mark.parametrize("execution", ["sequential", "full"])
@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_rounding_of_half_precision_is_no_reason_against_a_way(kind: str, execution: str) -> None:
    """The type of a prediction does not tell what it was computed in: ComfyUI's and Wan's are always float32."""
    torch.manual_seed(0)
    model = RoundsByRows().eval().requires_grad_(False)
    inputs = zoo.inputs(4)

    def ways() -> list[str]:
        predictor = stg.Predictor(model, [stg.Branch([2])], execution)
        with predictor.installed():
            for _ in range(3):
                predictor(model, (), inputs, rows=slice(2))
        return [made.way for made in predictor._made.values()]

    with pytest.warns(stg.StgWarning):  # in single precision, that is another result
        assert ways() != [execution]
    if kind == "weights":
        model.to(torch.bfloat16)
        assert ways() == [execution]
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert ways() == [execution]


# --- LoRA -------------------------------------------------------------------------------------------------------------


def add_lora(model: nn.Module, name: str, seed: int) -> None:
    """Add an adapter whose two factors are both random: peft starts with zeros."""
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "to_out.0"]), name)
    random = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    model.requires_grad_(False).eval()


def wan(block: int = 1) -> tuple[nn.Module, dict[str, Any], str]:
    family = zoo.FAMILIES["wan"]
    return family.build(), family.inputs(), f"blocks.{block}"


@pytest.mark.parametrize("execution", ONE_FAST)
@pytest.mark.parametrize("state", ["loaded", "fused", "weighted", "disabled"])
def test_lora(state: str, execution: str) -> None:
    model, inputs, layer = wan()
    plain = first(model(**inputs))
    add_lora(model, "one", 1)
    if state == "fused":
        model.fuse_lora()
    if state == "weighted":
        add_lora(model, "two", 2)
        model.set_adapters(["one", "two"], [0.7, 0.4])
    if state == "disabled":
        model.disable_adapters()
    assert torch.equal(first(model(**inputs)), plain) == (state == "disabled")
    check(model, zoo.without(model, [layer]), inputs, layer, execution, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("execution", ONE_FAST)
def test_lora_hot_swapped_while_applied(execution: str) -> None:
    """Loaded, switched, fused, unfused and deleted inside one `with`; each call uses what is there."""
    model, inputs, layer = wan()
    before = zoo.snapshot(model)

    def expected() -> Tensor:
        plain = copy.deepcopy(model)
        return textbook(plain, zoo.without(plain, [layer]), inputs)

    seen: list[Tensor] = []
    swaps: list[Callable[[], object]] = [
        lambda: None,
        lambda: add_lora(model, "one", 1),
        lambda: add_lora(model, "two", 2),
        lambda: model.set_adapter("one"),
        lambda: model.fuse_lora(),
        lambda: model.unfuse_lora(),
        lambda: model.delete_adapters(["one", "two"]),
    ]
    with stg.apply(model, [layer], SCALE, execution=execution):
        for swap in swaps:
            swap()
            wanted = expected()
            seen.append(first(model(**inputs)))
            assert_close(seen[-1], wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert zoo.is_plain(model)
    after = zoo.snapshot(model)["modules"]
    for name in ("", layer, "blocks.0"):
        assert after[name]["_forward_hooks"] == before["modules"][name]["_forward_hooks"]
        assert "forward" not in after[name]


# --- quantised weights ------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear layer as bitsandbytes and others replace them: integer buffers, a forward of its own, no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale, self.bias)


def pack(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Packed(module))
    return model


@executions
@pytest.mark.parametrize("name", ["plain", "image_text", "unet"])
def test_linear_layers_of_packed_weights(name: str, execution: str) -> None:
    model = pack(zoo.build(name))
    layer = zoo.ZOO[name].numbered[1]
    assert [found.name for found in stg.layers(model) if found.index is not None] == zoo.ZOO[name].numbered
    check(model, zoo.without(model, [layer]), zoo.inputs(), layer, execution, rtol=1e-4, atol=1e-4)


@executions
def test_torchao(execution: str) -> None:
    """Weights that are tensor subclasses."""
    torchao = pytest.importorskip("torchao.quantization")
    model, inputs, layer = wan()
    config = torchao.Int8WeightOnlyConfig()
    torchao.quantize_(model, config, lambda module, name: name.endswith(("to_q", "to_k", "to_v")))
    assert type(model.blocks[1].attn1.to_q.weight.data) is not Tensor
    check(model, zoo.without(model, [layer]), inputs, layer, execution, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["attention", "values"])
@pytest.mark.parametrize("what", ["packed", "bfloat16", "lora", "fused qkv"])
def test_attention_modes_on_changed_weights(what: str, mode: str) -> None:
    """The map as the identity is every token's own value: as if the scores were minus infinity off the diagonal."""
    model, inputs, _ = wan()
    if what == "packed":
        pack(model)
    if what == "bfloat16":
        model.to(torch.bfloat16)
        inputs = {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    if what == "lora":
        add_lora(model, "one", 1)
    with torch.no_grad():
        weak = diagonal(model, 1, inputs)
        if what == "fused qkv":
            model.fuse_qkv_projections()
        cond = first(model(**inputs))
        with stg.apply(model, [1], SCALE, mode=mode):
            got = first(model(**inputs))
    tolerance = 0.1 if what == "bfloat16" else 1e-4
    assert_close(got.float(), cond.float() + SCALE * (cond.float() - weak.float()), rtol=0, atol=tolerance)


def diagonal(model: nn.Module, block: int, inputs: dict[str, Any]) -> Tensor:
    """Predict with self-attention of one block masked down to its diagonal."""
    model = copy.deepcopy(model)
    attention = model.blocks[block].attn1
    forward = attention.forward

    def masked(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        original = nn.functional.scaled_dot_product_attention

        def only_self(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            return original(query, key, value, attn_mask=torch.eye(query.shape[-2], dtype=torch.bool))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "scaled_dot_product_attention", only_self)
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", only_self)
            return forward(hidden_states, *args, **kwargs)

    attention.forward = masked
    return first(model(**inputs))


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, run: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Differentiate the same function of a guided prediction, by both inputs and all parameters."""
    model.requires_grad_(True)
    model.zero_grad()
    x, text = (value.clone().requires_grad_() for value in zoo.inputs(4).values())
    out = run(model, x, text)
    (out.sin() * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    found = [x.grad, text.grad, *(p.grad for p in model.parameters())]
    model.requires_grad_(False)
    return [torch.zeros(()) if grad is None else grad for grad in found]


def by_hand(layer: int, rows: slice, mode: Callable[[nn.Module], nn.Module] = lambda block: zoo.Keep()) -> Any:
    """Write guidance down as two passes of the same parameters, the second without a block."""

    def run(model: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        cond = model(x, text)
        block = model.blocks[layer]
        model.blocks[layer] = mode(block)
        weak = model(x[rows], text[rows])
        model.blocks[layer] = block
        term = SCALE * (cond[rows] - weak)
        return cond + (term if rows == slice(None) else torch.cat([term, term]))

    return run


def guided(**settings: Any) -> Any:
    def run(model: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        with stg.apply(model, [2], SCALE, **settings):
            return model(x, text)

    return run


@executions
@pytest.mark.parametrize("batched_cfg", [False, True])
@pytest.mark.parametrize("name", ["plain", "expression"])
def test_gradients_through_a_guided_call(name: str, batched_cfg: bool, execution: str) -> None:
    model = zoo.build(name)
    expected = gradients(model, by_hand(2, slice(2, None) if batched_cfg else slice(None)))
    assert all(grad.abs().max() > 0 for grad in expected[:2])
    got = gradients(model, guided(batched_cfg=batched_cfg, execution=execution))
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


class ValuesOnly(nn.Module):
    """A block whose self-attention gives every token its own value."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attn = block.attn

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn.to_out(self.attn.to_v(x))
        x = x + self.block.cross(x, text)
        return x + nn.functional.gelu(self.block.ff(x))


@executions
def test_gradients_through_a_mode_that_computes(execution: str) -> None:
    model = zoo.build("plain")
    expected = gradients(model, by_hand(2, slice(None), ValuesOnly))
    assert_close(gradients(model, guided(mode="values", execution=execution)), expected, rtol=1e-4, atol=1e-5)


def test_gradients_through_a_guider_in_an_optimisation() -> None:
    """Three steps of gradient descent on a latent, as by a loss on what guidance predicts."""
    model = zoo.build("plain")
    x, text = zoo.inputs().values()
    guider = stg.Guider(model, [2], SCALE, guidance_scale=3.0)

    def reference(latent: Tensor) -> Tensor:
        cond, uncond, weak = (
            model(latent, text),
            model(latent, 0 * text),
            zoo.without(model, ["blocks.2"])(latent, text),
        )
        return uncond + 3.0 * (cond - uncond) + SCALE * (cond - weak)

    def descend(predict: Callable[[Tensor], Tensor]) -> Tensor:
        latent = nn.Parameter(x.clone())
        optimiser = torch.optim.SGD([latent], 0.05)
        for _ in range(3):
            optimiser.zero_grad()
            predict(latent).square().mean().backward()
            optimiser.step()
        return latent.detach()

    got = descend(lambda latent: guider(latent, cond={"text": text}, uncond={"text": 0 * text}))
    assert not torch.equal(got, x)
    assert_close(got, descend(reference), rtol=1e-4, atol=1e-5)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


class Checkpointed(zoo.DiT):
    """Computes blocks again in the backward pass, one by one or in pairs, from when it is switched on."""

    how: str | None = None

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        if self.how == "pairs":
            for i in range(0, len(self.blocks), 2):
                x = checkpoint(lambda x, i=i: self.blocks[i + 1](self.blocks[i](x, text), text), x, use_reentrant=False)
        else:
            for block in self.blocks:
                if self.how is None:
                    x = block(x, text)
                else:
                    what = {"block": block, "forward": block.forward}.get(self.how, block.__call__)
                    x = checkpoint(what, x, text, use_reentrant=self.how == "reentrant")
        return self.out(x)


@pytest.fixture
def checkpointed() -> Checkpointed:
    torch.manual_seed(0)
    return Checkpointed().eval()


@pytest.mark.parametrize("mode", ["residual", "values", "feed-forward"])
@pytest.mark.parametrize("execution", ["sequential", "full"])
def test_gradient_checkpointing(mode: str, execution: str, checkpointed: Checkpointed) -> None:
    expected = gradients(checkpointed, guided(mode=mode, execution="full"))
    if mode == "residual":
        assert_close(expected, gradients(checkpointed, by_hand(2, slice(None))), rtol=1e-4, atol=1e-5)
    checkpointed.how = "blocks"
    for _ in range(2):
        got = gradients(checkpointed, guided(mode=mode, execution=execution))
        assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["residual", "values"])
@pytest.mark.parametrize("how", ["block", "forward"])
def test_gradient_checkpointing_of_a_block_or_its_forward(how: str, mode: str, checkpointed: Checkpointed) -> None:
    expected = gradients(checkpointed, guided(mode=mode, execution="full"))
    checkpointed.how = how
    assert_close(gradients(checkpointed, guided(mode=mode)), expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_does_not_go_with_batched_execution(checkpointed: Checkpointed) -> None:
    expected = gradients(checkpointed, guided(execution="full"))
    checkpointed.how = "blocks"
    with pytest.warns(stg.StgWarning, match="gradient checkpointing would compute blocks again"):
        got = gradients(checkpointed, guided(execution="batched"))
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("how", "text"), [("pairs", "together with others"), ("reentrant", "use_reentrant=True")])
def test_gradient_checkpointing_that_would_undo_the_skip_is_refused(
    how: str, text: str, checkpointed: Checkpointed
) -> None:
    checkpointed.how = how
    before = zoo.snapshot(checkpointed)
    warnings.simplefilter("ignore")
    for execution in ("sequential", "full"):
        with pytest.raises(stg.CallError, match=f"{text}.*gradients would be wrong"):
            gradients(checkpointed, guided(execution=execution))
    assert zoo.snapshot(checkpointed.requires_grad_(True)) == before
    with torch.no_grad():  # without gradients it does no harm
        expected = textbook(checkpointed, zoo.without(checkpointed, ["blocks.2"]), zoo.inputs())
        assert_close(guided()(checkpointed, *zoo.inputs().values()), expected, rtol=1e-5, atol=1e-5)


def test_a_guided_call_that_is_checkpointed_as_a_whole(checkpointed: Checkpointed) -> None:
    expected = gradients(checkpointed, by_hand(2, slice(None)))
    guider = stg.Guider(checkpointed, [2], SCALE)
    got = gradients(checkpointed, lambda model, x, text: checkpoint(guider, x, text, use_reentrant=False))
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["residual", "attention"])
@pytest.mark.parametrize("family", ["wan", pytest.param("flux", marks=pytest.mark.slow)])
def test_gradient_checkpointing_of_diffusers(family: str, mode: str) -> None:
    case = zoo.FAMILIES[family]
    model, inputs = case.build().requires_grad_(True), case.inputs()

    def run() -> list[Tensor]:
        model.zero_grad()
        with stg.apply(model, [1], SCALE, mode=mode):
            first(model(**inputs)).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = run()
    model.train()
    model.enable_gradient_checkpointing()
    assert_close(run(), expected, rtol=1e-3, atol=1e-4)
