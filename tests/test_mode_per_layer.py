"""A dictionary as `layers`: a mode for each layer of one weak pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import zoo
from tests.test_modes import Zero, by_hand

close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
MODES = {2: "residual", "blocks.1": "values", re.compile(r"blocks\.0$"): "feed-forward"}


@pytest.fixture(autouse=True)
def _plain_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def wan() -> tuple[nn.Module, dict[str, Any]]:
    return zoo.FAMILIES["wan"].build(), zoo.FAMILIES["wan"].inputs()


def weak_by_hand(model: nn.Module) -> nn.Module:
    """Change each block in a copy by other means."""
    found = by_hand(zoo.without(model, ["blocks.2"]), ["blocks.1.attn1"], "values")
    found.set_submodule("blocks.0.ffn", Zero())
    return found


def test_each_layer_has_its_mode(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    before, expected = model(**inputs)[0], weak_by_hand(model)(**inputs)[0]
    with stg.skip(model, MODES) as skipped:
        assert [layer.name for layer in skipped.layers] == ["blocks.0", "blocks.1", "blocks.2"]
        assert_close(model(**inputs)[0], expected, **close)
    assert_close(model(**inputs)[0], before, rtol=0, atol=0)


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
@pytest.mark.parametrize(
    "modes", [MODES, {1: "attention-input", 2: "residual"}, {1: "residual", -1: "smoothed"}], ids=str
)
def test_in_one_weak_pass(wan: tuple[nn.Module, dict[str, Any]], modes: dict[Any, str], execution: str) -> None:
    model, inputs = wan
    plain = model(**inputs)[0]
    with stg.skip(model, modes):
        weak = model(**inputs)[0]
    branch = stg.Branch(modes, 1.5)
    for asked in ({"layers": modes, "scale": 1.5}, {"branches": [branch]}):
        with stg.apply(model, batched_cfg=False, execution=execution, **asked) as applied:
            for _ in range(2):
                assert_close(model(**inputs)[0], plain + 1.5 * (plain - weak), **close)
        assert applied.stats.weak_passes == 2
    guider = stg.Guider(model, modes, 1.5, execution=execution)
    assert_close(guider(**inputs)[0], plain + 1.5 * (plain - weak), **close)


def test_a_bypassed_layer_counts_as_saved_work(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    with stg.apply(model, {1: "values", 2: "residual"}, batched_cfg=False, execution="sequential") as applied:
        for _ in range(3):
            before = applied.stats.blocks_run
            model(**inputs)
    assert applied.stats.blocks_run - before == 1  # block 1: 0 is shared, 2 is not computed


def test_layers_of_a_mode_may_come_from_a_function(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    expected = weak_by_hand(model)

    def halved(call: stg.LayerCall) -> Any:
        assert call.name == "blocks.1"
        return call.compute() * 0.5

    with expected.blocks[1].register_forward_hook(lambda module, args, output: output * 0.5):
        reference = zoo.without(expected, [])(**inputs)[0]
    with stg.skip(model, {1: halved, 2: "residual", 0: "feed-forward"}):
        found = model(**inputs)[0]
    plain = by_hand(zoo.without(model, ["blocks.2"]), [], "values")
    plain.set_submodule("blocks.0.ffn", Zero())
    plain.blocks[1].register_forward_hook(lambda module, args, output: output * 0.5)
    assert_close(found, plain(**inputs)[0], **close)
    assert isinstance(reference, Tensor)


def test_all_layers_alike_are_the_same_as_a_list(wan: tuple[nn.Module, dict[str, Any]]) -> None:
    model, inputs = wan
    with stg.skip(model, {1: "values", 2: "values"}):
        found = model(**inputs)[0]
    with stg.skip(model, [1, 2], "values"):
        assert_close(model(**inputs)[0], found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layers", "mode", "error", "message"),
    [
        (
            {1: "values"},
            "attention",
            stg.SettingError,
            r"gives each layer its mode, and mode='attention' is another one",
        ),
        ({1: "valuse"}, "residual", stg.SettingError, r"unknown mode 'valuse'.*Did you mean 'values'"),
        ({1: "values", "blocks.1": "residual"}, "residual", stg.LayerError, r"gives 'blocks.1' two modes"),
        ({1: "residual", "blocks.1.attn1": "values"}, "residual", stg.LayerError, "the second is inside the first"),
        ({"blocks.1.ffn": "dropout", "blocks.1.attn1": "values"}, "residual", stg.LayerError, "are in one block"),
        ({"blocks.1.attn1": "residual"}, "residual", stg.LayerError, r"Did you mean layers=\['blocks.1'\]"),
        ({9: "values"}, "residual", stg.LayerError, r"layers=\[9\]"),
        ({"blocks": 1}, "residual", stg.SettingError, r"mode=1: expected a name or a callable, not int"),
        ({}, "residual", stg.LayerError, "names no layer"),
    ],
)
def test_dictionaries_that_cannot_be_used(
    wan: tuple[nn.Module, dict[str, Any]], layers: Any, mode: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stg.skip(wan[0], layers, mode)


def test_a_branch_checks_its_modes() -> None:
    with pytest.raises(stg.SettingError, match="unknown mode 'valuse'"):
        stg.Branch({1: "valuse"})
    with pytest.raises(stg.SettingError, match="Leave mode out"):
        stg.Branch({1: "values"}, mode="attention")
    assert stg.Branch({1: "values", 2: "smoothed"}).key == stg.Branch({1: "values", 2: "smoothed"}).key
    assert stg.Branch({1: "values"}).key != stg.Branch({1: "smoothed"}).key
