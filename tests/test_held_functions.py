"""Attention functions in lists, dictionaries, attributes, classes, partials, defaults and closures."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import stg_hooks as stg
from stg_hooks import adapters
from stg_hooks.adapters import ATTENTION_FUNCTIONS, Layout
from tests import held, opaque, zoo

PACKED = (("qkv", 0), ("qkv", 1), ("qkv", 2))


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    named = {
        "tests.held.kernel": Layout("b s h d"),
        "tests.held.packed": Layout("b s h d", *PACKED),
        "tests.held.packed_varlen": Layout("(b s) h d", *PACKED, ends="cu_seqlens"),
    }
    monkeypatch.setattr(adapters, "ATTENTION_FUNCTIONS", {**ATTENTION_FUNCTIONS, **named})
    before = held.held_now()
    with torch.no_grad():
        yield
    assert held.held_now() == before


def built(block: type[held.Block]) -> held.Stack:
    torch.manual_seed(0)
    return held.Stack(block).eval()


def by_hand(model: held.Stack, mode: str) -> Tensor:
    """Run a deep copy in whose second block each token sees itself alone, which gives its value in both modes."""
    block = copy.deepcopy(model)
    changed = block.blocks[1]
    changed.attention = lambda q, k, v: v
    return block(**zoo.inputs())


@pytest.mark.parametrize("mode", ["values", "attention"])
@pytest.mark.parametrize("block", [*held.HELD, held.Packed, held.PackedVarlen], ids=lambda block: block.__name__)
def test_a_function_is_found_where_it_is_held(block: type[held.Block], mode: str) -> None:
    model = built(block)
    plain = model(**zoo.inputs())
    expected = by_hand(model, mode)
    assert not torch.allclose(plain, expected)
    attributes = [dict(vars(module)) for module in model.modules()]
    with stg.skip(model, layers=[1], mode=mode):
        torch.testing.assert_close(model(**zoo.inputs()), expected, rtol=1e-5, atol=1e-6)
    with stg.apply(model, layers=[1], mode=mode, scale=1.5):
        guided = model(**zoo.inputs())
    torch.testing.assert_close(guided, plain + 1.5 * (plain - expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**zoo.inputs()), plain, rtol=0, atol=0)
    now = [dict(vars(module)) for module in model.modules()]
    assert [module.keys() for module in now] == [module.keys() for module in attributes]
    held_by = [value for module in attributes for value in module.values() if callable(value)]
    assert all(a is b for a, b in zip(held_by, [v for m in now for v in m.values() if callable(v)], strict=True))


@pytest.mark.parametrize("block", held.HELD, ids=lambda block: block.__name__)
def test_another_thread_has_the_function_itself(block: type[held.Block]) -> None:
    model = built(block)
    plain = model(**zoo.inputs())
    expected, seen = by_hand(model, "values"), []

    def change(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if threading.current_thread() is main and not seen:
            seen.append(None)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return opaque.plain(q, k, v, mask)

    def elsewhere() -> None:
        with torch.no_grad():
            seen.append(model(**zoo.inputs()))

    main = threading.current_thread()
    opaque.KERNEL.change = change
    try:
        with stg.skip(model, layers=[1], mode="values"):
            torch.testing.assert_close(model(**zoo.inputs()), expected, rtol=1e-5, atol=1e-6)
    finally:
        opaque.KERNEL.change = opaque.plain
    torch.testing.assert_close(seen[-1], plain, rtol=0, atol=0)


def test_a_function_that_is_put_elsewhere_meanwhile_is_left_there() -> None:
    model = built(held.OfAttribute)
    replaced = model.blocks[1]

    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return held.kernel(q, k, v)

    def change(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        replaced.attn_func = other
        return opaque.plain(q, k, v, mask)

    opaque.KERNEL.change = change
    try:
        with stg.skip(model, layers=[1], mode="values"):
            model(**zoo.inputs())
    finally:
        opaque.KERNEL.change = opaque.plain
    assert replaced.attn_func is other
