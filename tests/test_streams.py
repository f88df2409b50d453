"""What a bypassed block hands through: read in its source, else learnt from one real output, else refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks import adapters
from stg_hooks.modes.residual import Streams
from tests import zoo

exact: dict[str, Any] = {"rtol": 0, "atol": 0}


def learnt(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Bypass a block that has to be run once."""
    streams = Streams(block)
    known, _ = streams.bypass(args, kwargs)
    assert not known
    streams.learn(args, kwargs, block(*args, **kwargs))
    known, output = streams.bypass(args, kwargs)
    assert known
    return output


def test_what_the_source_says_is_not_run() -> None:
    class Unrunnable(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, None, Tensor]:
            raise AssertionError
            return text, None, image

    image, text = torch.randn(1, 2), torch.randn(1, 2)
    known, (first, nothing, last) = Streams(Unrunnable()).bypass((image,), {"text": text})
    assert known
    assert (first is text, nothing, last is image) == (True, None, True)


def test_streams_of_one_shape_are_told_apart_by_what_was_added_to_them() -> None:
    class Swapping(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> Any:
            return [text + 0.5 * image.roll(1), image + 0.5 * text.roll(1)]

    image, text = torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    first, last = learnt(Swapping(), image, text)
    assert first is text
    assert last is image


def test_streams_of_one_shape_are_told_apart_by_name() -> None:
    """The positions are added in full, so that the output resembles them as much as what it was made of."""

    class Positioned(nn.Module):
        def forward(self, positions: Tensor, hidden: Tensor, flag: bool = False) -> Any:
            hidden = hidden + positions
            return (hidden, flag) if flag else hidden

    positions, hidden = torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    assert learnt(Positioned(), positions, hidden) is hidden


def test_one_input_given_twice_is_no_riddle() -> None:
    block, text = zoo.ExpressionBlock(), torch.randn(2, 3, zoo.DIM)
    assert learnt(block, text, text) is text


def test_a_call_of_another_form_is_learnt_anew() -> None:
    """Two samples instead of three, an argument that was missing, a flag: each may change what is returned."""

    class Changing(nn.Module):
        def forward(self, samples: list[Tensor], extra: Tensor | None = None, paired: bool = False) -> Any:
            output = [2 * sample for sample in samples]
            return (output, 2 * extra) if paired and extra is not None else output

    block, streams, extra = Changing(), Streams(Changing()), torch.randn(3)
    for count, more in ((3, {}), (2, {}), (2, {"extra": extra}), (2, {"extra": extra, "paired": True})):
        samples = [torch.randn(4, size) for size in range(2, 2 + count)]
        assert not streams.bypass((samples,), more)[0]
        streams.learn((samples,), more, block(samples, **more))
        output = streams.bypass((samples,), more)[1]
        rows = output[0] if "paired" in more else output
        assert [row is sample for row, sample in zip(rows, samples, strict=True)] == [True] * count
    assert streams.bypass(([torch.randn(4, 2)] * 3,), {})[0]


def test_an_output_that_an_input_matches_by_chance_is_refused() -> None:
    """Five tokens become three, and the text has three."""
    x, text = torch.randn(2, 5, 800), torch.randn(2, 3, 800)

    class Shrinking(nn.Module):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return (x * 2)[:, ::2]

    with pytest.raises(
        stg.BlockError, match=r"a tensor \(2, 3, 800\) that one input matches, but does not resemble, in"
    ):
        learnt(Shrinking(), x, text)


def test_a_close_race_is_refused_with_what_to_type() -> None:
    class Mixing(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Any:
            return (one + other, 1.0)

    one = torch.randn(2, 7, 8)
    with pytest.raises(stg.BlockError) as error:
        learnt(Mixing(), one, other=one.roll(1))
    first, *rest = str(error.value).splitlines()
    assert first == (
        "Mixing returns a tensor (2, 7, 8) that several inputs match in shape and dtype (inputs: (2, 7, 8), "
        "(2, 7, 8)), so which inputs pass through it is not known, and it cannot be bypassed."
    )
    assert rest == [
        "  it is:    Mixing.forward(one, other)",
        "  it got:   one=(2, 7, 8), other=(2, 7, 8)",
        "  it gave:  tuple((2, 7, 8), 1.0)",
        "Skip another layer, or first state which arguments stand in for the tensors that it gave, in their order:",
        "  from stg_hooks.adapters import STREAMS",
        '  STREAMS["Mixing"] = ("one",)',
    ]


class HeadsBlock(zoo.Block):
    """What it returns looks as much like the one as like the other of its streams, which are of one shape."""

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, float, Tensor]:
        return F.normalize(x, dim=-1) + F.normalize(text, dim=-1), 1.0, text + self.ff(x)


class KeepHeads(nn.Module):
    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, float, Tensor]:
        return x, 1.0, text


def of_one_shape() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, zoo.DIM), "text": torch.randn(2, 5, zoo.DIM)}


class HeadsDiT(zoo.DiT):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x, one, text = block(x, text)
            x = one * x
        return self.out(x) + text.mean()


class DerivedHeadsBlock(HeadsBlock):
    """An adapter for a class holds for those that derive from it."""


@pytest.mark.parametrize("block", [HeadsBlock, DerivedHeadsBlock])
def test_the_lines_of_adapter_that_the_error_says_to_type_work(
    block: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "STREAMS", {})
    torch.manual_seed(0)
    model, inputs = HeadsDiT(block).eval().requires_grad_(False), of_one_shape()
    with pytest.raises(stg.BlockError, match="that several inputs match") as error, stg.skip(model, [1]):
        model(**inputs)
    lines = [line.strip() for line in str(error.value).splitlines()[-2:]]
    assert lines == ["from stg_hooks.adapters import STREAMS", f'STREAMS["{block.__name__}"] = ("x", "text")']
    exec("\n".join(lines).replace("Derived", ""), {})
    expected = zoo.without(model, ["blocks.1"], KeepHeads)(**inputs)
    assert float((expected - model(**inputs)).abs().max()) > 1e-3
    with stg.skip(model, [1]):
        for _ in range(2):
            assert_close(model(**inputs), expected, **exact)


def test_an_adapter_comes_before_what_the_source_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swapped(nn.Module):
        def forward(self, samples: list[Tensor], text: Tensor) -> tuple[list[Tensor], Tensor]:
            return samples, text

    monkeypatch.setitem(adapters.STREAMS, "Swapped", ("text", "samples"))
    samples, text = [torch.randn(2), torch.randn(3)], torch.randn(4)
    (first, second), last = learnt(Swapped(), samples, text)
    assert first is text
    assert (second is samples[0], last is samples[1]) == (True, True)


@pytest.mark.parametrize("names", [("y",), ("x", "text"), ()])
def test_an_adapter_that_does_not_fit_is_an_error(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapters.STREAMS, "ExpressionBlock", names)
    told = f"STREAMS['ExpressionBlock'] = {names} does not fit a call that was given tensors as x, text and returned 1"
    with pytest.raises(stg.BlockError, match=re.escape(told)):
        learnt(zoo.ExpressionBlock(), **zoo.inputs())


def test_what_the_error_says_to_type_works() -> None:
    torch.manual_seed(0)
    model, inputs = zoo.ObjectDiT(zoo.ObjectBlock).eval().requires_grad_(False), zoo.inputs()
    told = "ObjectBlock returns a BlockOutput that none of its inputs matches"
    with pytest.raises(stg.BlockError, match=told) as error, stg.skip(model, [1]):
        model(**inputs)
    typed = next(line.strip() for line in str(error.value).splitlines() if line.startswith("  def pass_through"))
    assert typed == "def pass_through(call): return BlockOutput(call.args[0])"
    scope: dict[str, Any] = {"BlockOutput": zoo.BlockOutput}
    exec(typed, scope)

    class KeepObject(nn.Module):
        def forward(self, x: Tensor, text: Tensor) -> zoo.BlockOutput:
            return zoo.BlockOutput(x)

    expected = zoo.without(model, ["blocks.1"], KeepObject)(**inputs)
    with stg.skip(model, [1], mode=scope["pass_through"]):
        assert_close(model(**inputs), expected, **exact)
