"""Models whose layers looking does not find: the first call inside the `with` tells them.

Shapes of code: attention by a function of the module's own, in blocks whose names and children tell nothing, as in
small research code (minRF-like trainers, notebooks). The oracle is a deep copy whose block is replaced by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests import originals, zoo
from tests.test_original_layers import Hidden


class Counting(Hidden):
    """Keeps a count and a buffer, draws random numbers, and writes into its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("running", torch.zeros(zoo.DIM))

    def forward(self, x: Tensor, text: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.calls += 1
        noise = torch.randn(x.shape) + torch.randn(x.shape, generator=generator)
        x += 0.1 * noise
        self.running.mul_(0.9).add_(x.detach().mean((0, 1)))
        return super().forward(x, text) + self.running


class Bare(nn.Module):
    """No list of blocks at all, and nothing that computes attention."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(zoo.DIM, zoo.DIM), nn.Linear(zoo.DIM, zoo.DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x + self.two(self.one(x)) + text.mean()


class InDictionary(nn.Module):
    """Blocks in a dictionary, called by their keys in another order than they are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({name: originals.Unseen() for name in ("out", "mid", "in")})

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for name in ("in", "mid", "out"):
            x = self.stages[name](x) + text.mean(1, keepdim=True)
        return x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(zoo.DIM), nn.Linear(zoo.DIM, zoo.DIM), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class WithoutAttention(nn.Module):
    """Blocks without attention, as MAR's head for the diffusion of one token has them."""

    def __init__(self) -> None:
        super().__init__()
        self.text_blocks, self.res_blocks = (nn.ModuleList(Residual() for _ in range(n)) for n in (2, 3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.text_blocks:
            text = block(text)
        for block in self.res_blocks:
            x = block(x) + text.mean(1, keepdim=True)
        return x


def built(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def replaced(model: nn.Module, name: str) -> Tensor:
    """Call a copy in which one block hands its input through."""
    other = copy.deepcopy(model)
    other.get_submodule(name).forward = lambda x: x
    with torch.no_grad():
        return other(**zoo.inputs())


def plain(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model)(**zoo.inputs())


def by_skip(model: nn.Module, layer: int) -> Tensor:
    with torch.no_grad(), stg.skip(model, layers=[layer]):
        return model(**zoo.inputs())


def by_apply(model: nn.Module, layer: int) -> Tensor:
    with torch.no_grad(), stg.apply(model, layers=[layer], scale=-1.0):  # cond - (cond - weak)
        return model(**zoo.inputs())


def by_uncond(model: nn.Module, layer: int) -> Tensor:
    both = {name: torch.cat([value, value]) for name, value in zoo.inputs().items()}
    with torch.no_grad(), stg.apply(model, layers=[layer], on="uncond", batched_cfg=True):
        return model(**both).chunk(2)[0]


def by_guider(model: nn.Module, layer: int) -> Tensor:
    with torch.no_grad():
        return stg.Guider(lambda **given: model(**given), model=model, layers=[layer], scale=-1.0)(**zoo.inputs())


def by_predictor(model: nn.Module, layer: int) -> Tensor:
    predictor = stg.Predictor(model, [stg.Branch([layer])])
    with torch.no_grad(), predictor.installed():
        return predictor(model, (), zoo.inputs())[1][0][0]


FACES = (by_skip, by_apply, by_uncond, by_guider, by_predictor)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(
    ("cls", "layer", "name"),
    [(Hidden, 2, "late.0"), (InDictionary, 0, "stages.in"), (WithoutAttention, 1, "res_blocks.1")],
)
def test_the_first_call_tells_the_layers(
    face: Callable[[nn.Module, int], Tensor], cls: type[nn.Module], layer: int, name: str
) -> None:
    model = built(cls)
    expected = replaced(model, name)
    assert not torch.allclose(expected, plain(model))
    torch.testing.assert_close(face(model, layer), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain(model), plain(built(cls)), rtol=0, atol=0)


@pytest.mark.parametrize("face", FACES)
def test_what_then_does_not_exist_is_an_error_of_the_first_call_that_leaves_nothing(
    face: Callable[[nn.Module, int], Tensor],
) -> None:
    for cls, message in ((Hidden, "Hidden has 4 layers"), (Bare, "in a call of it, neither attention nor")):
        model = built(cls)
        before = state_of(model)
        with pytest.raises(stg.LayerError, match=message):
            face(model, 7)
        assert state_of(model) == before


def state_of(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        name: (set(vars(module)), [len(getattr(module, kind)) for kind in hooks])
        for name, module in model.named_modules()
    }


def test_state_random_numbers_and_arguments_are_as_they_were() -> None:
    outputs = []
    for is_skipped in (False, True):
        model = built(Counting)
        torch.manual_seed(3)
        given = {**zoo.inputs(), "generator": torch.Generator().manual_seed(4)}
        with torch.no_grad():
            if is_skipped:
                with stg.skip(model, layers=[2]):
                    output = model(**given)
            else:
                model.late[0].forward = lambda x: x
                output = model(**given)
        numbers = torch.rand(3), torch.rand(3, generator=given["generator"])
        outputs.append((output, given["x"], model.running, numbers, model.calls))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


def test_a_guided_call_leaves_what_one_plain_call_leaves() -> None:
    left = []
    for is_guided in (False, True):
        model = built(Counting)
        torch.manual_seed(3)
        given = zoo.inputs()
        with torch.no_grad():
            if is_guided:
                with stg.apply(model, layers=[2]):
                    model(**given)
            else:
                model(**given)
        left.append((given["x"], model.running, torch.rand(3), model.calls))
    torch.testing.assert_close(left[0], left[1], rtol=0, atol=0)


def test_gradients_pass_as_they_do_without_it() -> None:
    model = built(Hidden)
    with stg.skip(model, layers=[2]):
        model(**zoo.inputs()).sum().backward()
    assert model.late[0].linear1.weight.grad is None
    other = built(Hidden)
    other.late[0].forward = lambda x: x
    other(**zoo.inputs()).sum().backward()
    torch.testing.assert_close(model.early[0].linear1.weight.grad, other.early[0].linear1.weight.grad)


def test_what_looking_can_tell_is_wrong_is_an_error_at_once() -> None:
    for layers in (["late.7"], [0, "late.7"], {0: "residual", "late.7": "values"}, [None], []):
        for make in (stg.skip, stg.apply, stg.Guider):
            with pytest.raises(stg.StgError):
                make(built(Hidden), layers=layers)
    branches = [stg.Branch([0]), stg.Branch(["late.7"])]
    with pytest.raises(stg.LayerError, match=r"late\.7"):
        stg.Predictor(built(Hidden), branches)
    with pytest.raises(stg.LayerError, match=r"stg\.layers\(model, example=dict"):
        stg.check(built(Hidden), layers=[0])


def test_modes_of_attention_by_index_and_by_name() -> None:
    model = built(Hidden)
    by_hand = copy.deepcopy(model)
    block = by_hand.late[0]
    block.forward = lambda x: x + block.linear2(block.linear1(x)[..., 2 * zoo.DIM :])
    with torch.no_grad():
        expected = by_hand(**zoo.inputs())
        for layers in ([2], ["late.0"], {2: "values"}):
            other = copy.deepcopy(model)
            skip = stg.skip(other, layers=layers, mode="residual" if isinstance(layers, dict) else "values")
            assert skip.layers == []
            with skip:
                torch.testing.assert_close(other(**zoo.inputs()), expected, rtol=1e-5, atol=1e-6)
            assert [layer.name for layer in skip.layers] == ["late.0"]


def test_skips_in_one_another_find_their_layers_in_one_call() -> None:
    model = built(Hidden)
    other = copy.deepcopy(model)
    other.late[0].forward = other.early[1].forward = lambda x: x
    with torch.no_grad(), stg.skip(model, layers=[1]), stg.skip(model, layers=[2]):
        torch.testing.assert_close(model(**zoo.inputs()), other(**zoo.inputs()), rtol=0, atol=0)


def test_an_error_of_the_model_in_the_first_call_is_its_own() -> None:
    model = built(Hidden)
    with stg.skip(model, layers=[2]):
        with pytest.raises(TypeError, match="text"):
            model(zoo.inputs()["x"])
        torch.testing.assert_close(model(**zoo.inputs()), replaced(built(Hidden), "late.0"))
