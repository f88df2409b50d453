"""Modes with values in brackets: a blur of finite width, a part of a layer's output; how they are typed and travel."""

from __future__ import annotations

import copy
import json
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.modes.blur import gaussian_blur
from stg_hooks.modes.modes import Dropout, Smoothed, find_mode
from tests import tiny_models, zoo
from tests.test_modes import assert_close_in_std, by_hand

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


@pytest.fixture(autouse=True)
def _plain_inference() -> Any:
    with torch.no_grad():
        yield


# --- smoothed energy guidance with a finite width ---------------------------------------------------------------------


def of_diffusers(sigma: float, side: int) -> Callable[[Tensor], Tensor]:
    """Blur each square frame as diffusers' SEG does, the conditions of whose two cases are the wrong way round."""
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2

    def blur(queries: Tensor) -> Tensor:
        frames = queries.reshape(-1, side * side, queries.shape[-1]).clone()
        return _gaussian_blur_2d(frames, size, sigma, -1.0).reshape(queries.shape)

    return blur


@pytest.mark.parametrize("sigma", [0.5, 1.0, 9.0])
@pytest.mark.parametrize(
    ("family", "layer", "attention", "text", "side", "frames"),
    [
        ("unet2d", 1, "mid_block.attentions.0.transformer_blocks.0.attn1", None, 4, 1),
        ("sd3", 1, "transformer_blocks.1.attn", ("last", 5), 2, 1),
        ("cogvideox", 1, "transformer_blocks.1.attn1", ("first", 5), 2, 2),
        ("wan", 1, "blocks.1.attn1", None, 2, 2),
    ],
)
def test_a_blur_of_finite_width(
    family: str, layer: int, attention: str, text: tuple[str, int] | None, side: int, frames: int, sigma: float
) -> None:
    model, inputs = zoo.FAMILIES[family].build(), zoo.FAMILIES[family].inputs()
    expected = by_hand(model, [attention], "smoothed", text, of_diffusers(sigma, side))(**inputs)[0]
    grid = f", height={side}, width={side}" if frames > 1 else ""
    with stg.skip(model, layer, f"smoothed(sigma={sigma}{grid})"):
        actual = model(**inputs)[0]
    assert_close_in_std(actual, expected)
    for mode in (None, "smoothed"):
        with stg.skip(model, layer, mode) if mode else torch.no_grad():
            assert not torch.allclose(model(**inputs)[0], expected, rtol=0, atol=1e-5 * expected.std().item())


@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 2), (1, 7), (1, 1)])
@pytest.mark.parametrize("sigma", [0.4, 2.0, 50.0])
def test_the_blur_of_a_grid_written_out(height: int, width: int, sigma: float) -> None:
    """One token at a time, with the weights of the code of SEG, per axis."""
    grid = torch.randn(2, height, width, 3, generator=torch.Generator().manual_seed(0))

    def weights(size: int) -> dict[int, float]:
        full = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        reach = (min(full, size - (size % 2 - 1)) - 1) // 2
        found = {i: math.exp(-0.5 * (i / sigma) ** 2) for i in range(-reach, reach + 1)}
        return {i: value / sum(found.values()) for i, value in found.items()}

    def inside(i: int, size: int) -> int:
        return abs(i) if i < size else 2 * (size - 1) - i

    expected = torch.zeros_like(grid)
    for y in range(height):
        for x in range(width):
            for dy, a in weights(height).items():
                for dx, b in weights(width).items():
                    expected[:, y, x] += a * b * grid[:, inside(y + dy, height), inside(x + dx, width)]
    assert_close(gaussian_blur(grid, sigma), expected)


def test_multi_head_attention_of_torch_is_blurred_before_its_projection() -> None:
    model, inputs = zoo.build("encoder"), zoo.inputs()
    layer = model.encoder.layers[1]
    blur = Smoothed(1.0, 1, 5)._blurred  # of the five video tokens in front, the others are text
    reference = copy.deepcopy(model)

    class Blurred(nn.Module):
        batch_first, _qkv_same_embed_dim = layer.self_attn.batch_first, True

        def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
            a = layer.self_attn
            q, k, v = (
                t.unflatten(-1, (a.num_heads, -1)).transpose(1, 2)
                for t in F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
            )
            q = torch.cat([blur(q[..., :5, :]), q[..., 5:, :]], dim=-2)
            mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
            return a.out_proj(mixed.transpose(1, 2).flatten(2)), None

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    reference.encoder.layers[1].self_attn = Blurred()
    expected = reference(**inputs)
    torch.backends.mha.set_fastpath_enabled(before)
    with stg.skip(model, 1, "smoothed(sigma=1.0, height=1, width=5)"):
        assert_close_in_std(model(**inputs), expected)


def test_tokens_that_are_no_grid() -> None:
    model, inputs = zoo.FAMILIES["wan"].build(), zoo.FAMILIES["wan"].inputs()
    with (
        stg.skip(model, 1, "smoothed(sigma=2)"),
        pytest.raises(stg.BlockError, match=r"8 tokens are no square.* such as mode='smoothed") as told,
    ):
        model(**inputs)
    suggested = str(told.value).rpartition("mode=")[2].rstrip(".").strip("'")
    with stg.skip(model, 1, suggested):
        model(**inputs)
    with (
        stg.skip(model, 1, "smoothed(sigma=2, height=3, width=2)"),
        pytest.raises(stg.BlockError, match="8 tokens are no whole number of frames of 3 x 2"),
    ):
        model(**inputs)


def test_spatial_attention_alone_is_blurred() -> None:
    model, inputs = zoo.FAMILIES["svd"].build(), zoo.FAMILIES["svd"].inputs()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    expected = by_hand(model, [name], "smoothed", None, of_diffusers(1.0, 8))(**inputs)[0]
    with stg.skip(model, 0, "smoothed(sigma=1.0)", kind="spatial"):
        assert_close_in_std(model(**inputs)[0], expected)


# --- a part of a layer's output ---------------------------------------------------------------------------------------


def dropped(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have `F.dropout`, as diffusers calls it, drop what the mode drops in a layer, written out here."""
    real = F.dropout

    def dropout(output: Tensor, *args: Any, **options: Any) -> Tensor:
        if args:  # of `nn.Dropout`
            return real(output, *args, **options)
        generator = torch.Generator().manual_seed(torch.initial_seed() + zlib.crc32(name.encode()))
        mask = torch.rand(output.shape[1:], generator=generator) >= options["p"]
        return output * mask / (1 - options["p"])

    monkeypatch.setattr(F, "dropout", dropout)


@pytest.mark.parametrize(
    ("family", "config", "name"),
    [
        ("PixArtTransformer2DModel", {"skip_ff": False}, "transformer_blocks.1.attn1"),
        ("WanTransformer3DModel", {"skip_attention": False}, "blocks.1.ffn"),
    ],
)
def test_dropout_of_diffusers(family: str, config: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model, inputs = tiny_models.MODELS[family].build(family), tiny_models.MODELS[family].inputs()
    plain = model(**inputs)[0]
    with stg.skip(model, name, "dropout(p=0.3)"):
        found = model(**inputs)[0]
    _apply_layer_skip_hook(model, LayerSkipConfig([1], dropout=0.3, **config))
    dropped(monkeypatch, name)
    assert_close(found, model(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)


def test_dropout_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both parts of a block, diffusers drops the output of its feed-forward as well, so this is written out."""
    model, inputs = zoo.FAMILIES["wan"].build(), zoo.FAMILIES["wan"].inputs()
    with stg.skip(model, 1, "dropout(p=0.3)"):
        found = model(**inputs)[0]
    dropped(monkeypatch, "blocks.1")
    with model.blocks[1].register_forward_hook(lambda module, args, output: F.dropout(output, p=0.3)):
        assert_close(found, model(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_dropout_is_the_callers_seed_and_leaves_the_random_state() -> None:
    model, inputs = zoo.FAMILIES["wan"].build(), zoo.FAMILIES["wan"].inputs()
    found = {}
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        torch.randn(3)
        before = torch.get_rng_state()
        with stg.skip(model, [1, 2], "dropout"):
            one, other = model(**inputs)[0], model(**inputs)[0]
        assert_close(one, other, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(found.setdefault(seed, one), one)
    assert not torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_how_much_is_dropped() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
            return x, torch.arange(3), 7

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Layer(), Layer()

        def forward(self, x: Tensor) -> tuple[Any, Any]:
            return self.one(x), self.two(x)

    ones = torch.ones(2, 400, 50)
    with stg.skip(Model(), ["one", "two"], "dropout(p=0.25)") as skipped:
        (one, numbers, seven), (two, *_) = skipped._model(ones)
    assert (one == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert_close(one[one != 0], torch.full_like(one[one != 0], 4 / 3))
    assert torch.equal(one[0], one[1])
    assert (one != two).float().mean().item() == pytest.approx(2 * 0.25 * 0.75, abs=0.02)  # each layer its own
    assert (numbers.tolist(), seven) == ([0, 1, 2], 7)


# --- how they are typed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("smoothed(sigma=-1)", "expected sigma above 0"),
        ("smoothed(sigma='wide')", "expected sigma above 0"),
        ("smoothed(sigma=2, height=4)", "height and width, in tokens, come together"),
        ("smoothed(height=4, width=4)", "come together, and with a sigma"),
        ("smoothed(sigm=2)", "'smoothed' has no value 'sigm'; choose from sigma, height, width. Did you mean 'sigma'?"),
        ("residual(p=0.5)", "'residual' has no value 'p'; it has none"),
        ("smoothed(10)", "Write them by their names, as in mode='smoothed(sigma=None, height=None, width=None)'"),
        ("smoothed(sigma=ten)", "cannot read the values in brackets"),
        ("smoothed(sigma=__import__('os'))", "cannot read the values in brackets"),
        ("residual(5)", "cannot read the values in brackets. 'residual' has none"),
        ("smooth(sigma=10)", "choose from .*Did you mean 'smoothed'"),
        ("dropout(p=1)", "a part p between 0 and 1. mode='residual' leaves out whole blocks"),
        ("dropout(p=True)", "a part p between 0 and 1"),
    ],
)
def test_values_that_cannot_be_used(mode: str, message: str) -> None:
    with pytest.raises(stg.SettingError) as told:
        stg.check(zoo.build("plain"), 1, mode)
    assert re.search(f"^(mode=|unknown mode).*{message if '.*' in message else re.escape(message)}", str(told.value))


def test_the_same_mode_in_three_spellings() -> None:
    modes = ["smoothed(sigma=2.0)", "smoothed( sigma = 2.0 )", Smoothed(sigma=2.0)]
    assert len({find_mode(mode) for mode in modes}) == 1
    assert {str(find_mode(mode)) for mode in modes} == {"mode='smoothed(sigma=2.0)'"}
    assert find_mode("smoothed()") == find_mode("smoothed") == Smoothed()
    assert find_mode("dropout(p=0.2)") == Dropout(0.2) != Dropout()
    branches = [stg.Branch([1], 1.0, "smoothed(sigma=2)"), stg.Branch([1], 1.0, Smoothed(2))]
    with pytest.raises(stg.SettingError, match="perturb the same layers in the same way"):
        stg.apply(zoo.build("plain"), branches=branches)


@pytest.mark.parametrize("mode", ["smoothed(sigma=2.0, height=4, width=3)", "dropout(p=0.25)"])
def test_modes_with_values_travel(mode: str) -> None:
    model = zoo.build("plain")
    for given in (mode, find_mode(mode)):
        applied = stg.apply(model, [1], mode=given)
        applied.not_to_be_entered()
        assert applied.to_dict() == {"layers": [1], "mode": mode}
        again = stg.apply(model, **json.loads(json.dumps(applied.to_dict())))
        again.not_to_be_entered()
        assert find_mode(again.plan.base.branches[0].mode) == find_mode(mode)


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
@pytest.mark.parametrize("mode", ["smoothed(sigma=1, height=2, width=2)", "dropout(p=0.25)"])
def test_modes_with_values_in_a_guided_call(mode: str, execution: str) -> None:
    model, inputs = zoo.FAMILIES["wan"].build(), zoo.FAMILIES["wan"].inputs()
    plain = model(**inputs)[0]
    with stg.skip(model, 1, mode):
        weak = model(**inputs)[0]
    with stg.apply(model, 1, 2.0, mode=mode, batched_cfg=False, execution=execution):
        guided = [model(**inputs)[0] for _ in range(2)]
    for one in guided:
        assert_close(one, plain + 2.0 * (plain - weak), rtol=1e-4, atol=1e-5)
