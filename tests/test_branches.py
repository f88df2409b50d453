"""Layers that do not add to their input themselves: the model adds what they give, and a bypass adds nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg
from tests import zoo

DIM = 32


pytestmark = pytest.mark.usefixtures("inference")


class Attention(nn.Module):
    """No residual connection inside, as in smalldiffusion, lucidrains' models, and diffusers where it is left out."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM) if norm else nn.Identity()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def branch(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).transpose(1, 3).unbind(2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)


class AddsItself(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Scaled(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)) / 2**0.5


class PostNormAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x + self.branch(x), (DIM,))


class Remembers(Attention):
    def __init__(self) -> None:
        super().__init__(norm=True)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.mean()))
        x = self.branch(x)
        F.dropout(x, 0.5, inplace=True)
        return x


class PreNorm(nn.Module):
    """Holds attention, is none, and has no residual connection either."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(DIM), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


Step = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


def in_place(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    x += layer(x)
    return x


STEPS: dict[str, Step] = {
    "adds": lambda x, layer: layer(x) + x,
    "adds in place": in_place,
    "adds what norm is given": lambda x, layer: x + layer(F.layer_norm(x, (DIM,))),
    "gates": lambda x, layer: x + x.mean(1, keepdim=True).tanh() * layer(F.layer_norm(x, (DIM,))),
    "norm behind": lambda x, layer: x + F.layer_norm(layer(x), (DIM,)),
    "scaled sum": lambda x, layer: torch.add(x, layer(x), alpha=0.3),
    "tokens in the middle": lambda x, layer: x + layer(x.mT.mT.contiguous()).reshape(x.shape),
    "addcmul": lambda x, layer: torch.addcmul(x, x.tanh(), layer(x)),
}


class Model(nn.Module):
    def __init__(self, step: Step, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attns = nn.ModuleList(layer() for _ in range(3))
        self.ffs = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.step = step

    def forward(self, x: Tensor, without: int | None = None) -> Tensor:
        x = x.clone()
        for number, (attn, ff) in enumerate(zip(self.attns, self.ffs, strict=True)):
            if number != without:
                x = self.step(x, attn)
            x = x + ff(x)
        return x


def x() -> Tensor:
    return torch.randn(2, 6, DIM)


@pytest.mark.parametrize("layer", [Attention, lambda: Attention(norm=True), PreNorm])
@pytest.mark.parametrize("step", STEPS)
def test_a_branch_adds_nothing(step: str, layer: Callable[[], nn.Module]) -> None:
    model, given = Model(STEPS[step], layer), x()
    expected = model(given, without=1)
    with stg.skip(model, [1]):
        for _ in range(2):
            actual = model(given)
            assert type(actual) is Tensor
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", [AddsItself, Scaled])
def test_what_adds_to_its_input_hands_it_through(layer: Callable[[], nn.Module]) -> None:
    model, given = Model(lambda x, layer: layer(x), layer), x()
    expected = model(given, without=1)
    with stg.skip(model, [1]):
        torch.testing.assert_close(model(given), expected)


def test_the_trial_leaves_no_trace_and_happens_once() -> None:
    model, given = Model(STEPS["adds"], Remembers), x()
    random, before = torch.get_rng_state(), zoo.snapshot(model.attns[1])
    with stg.skip(model, [1]):
        model(given)
        model(given)
    assert zoo.snapshot(model.attns[1]) == before
    assert float(model.attns[1].calls) == 0
    assert model.attns[1].seen == []
    drawn = torch.get_rng_state()
    torch.set_rng_state(random)
    for _ in range(2):
        model(given, without=1)
    assert torch.equal(drawn, torch.get_rng_state())


def test_what_cannot_be_told_is_refused_with_what_to_type() -> None:
    model, given = Model(lambda x, layer: layer(x), PostNormAttention), x()
    with pytest.raises(stg.BlockError, match="whether its output contains") as error, stg.skip(model, [1]):
        model(given)
    through, nothing = typed(str(error.value), model)
    with through:
        actual = model(given)
    torch.testing.assert_close(actual, model(given, without=1))
    with nothing:
        assert (model(given) - actual).abs().max() > 1e-3


def typed(message: str, model: nn.Module) -> list[Any]:
    return [
        eval(line.strip(), {"stg": stg, "torch": torch, "model": model, "layers": [1]})
        for line in re.findall(r"^  (stg\.skip.*?)(?: +#.*)?$", message, re.MULTILINE)
    ]


@pytest.mark.parametrize(
    "step",
    [
        lambda x, layer: torch.lerp(x, layer(x), 0.5),
        lambda x, layer: layer(x),
        lambda x, layer: torch.where(x > 0, layer(x), x),
        lambda x, layer: F.linear(torch.cat([x, layer(x)], -1), torch.ones(DIM, 2 * DIM)),
    ],
)
def test_a_branch_that_is_not_simply_added_is_refused(step: Step) -> None:
    model, given = Model(step, Attention), x()
    with pytest.raises(stg.BlockError, match="not simply add") as error, stg.skip(model, [1]):
        model(given)
    assert len(typed(str(error.value), model)) == 2


class JointAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        both = self.one(torch.cat([x, text], 1))
        x, text = both[:, : x.shape[1]], both[:, x.shape[1] :]
        return x, text


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attns = nn.ModuleList(JointAttention() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, without: int | None = None) -> Tensor:
        for number, attn in enumerate(self.attns):
            if number != without:
                of_x, of_text = attn(F.layer_norm(x, (DIM,)), text)
                x, text = x + of_x, text + of_text
        return x


def test_a_joint_branch_adds_nothing_to_either_stream() -> None:
    model, given, text = Joint(), x(), torch.randn(2, 3, DIM)
    with stg.skip(model, [1]):
        actual = [model(given, text) for _ in range(2)]
    for one in actual:
        torch.testing.assert_close(one, model(given, text, without=1))


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_every_execution_bypasses_a_branch(execution: str) -> None:
    model, given = Model(STEPS["gates"], Attention), x()
    cond, weak = model(given), model(given, without=1)
    with stg.apply(model, [1], 2.0, execution=execution):
        for _ in range(2):
            torch.testing.assert_close(model(given), cond + 2 * (cond - weak), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
def test_a_branch_that_is_compiled_alone_or_with_its_model_adds_nothing(whole: bool) -> None:
    torch.compiler.reset()
    model, given = Model(STEPS["adds"], Attention), x()
    expected = model(given, without=1)
    for part in [model] if whole else model.attns:
        part.compile(backend="eager")
    with stg.skip(model, [1]):
        for _ in range(2):
            torch.testing.assert_close(model(given), expected)
