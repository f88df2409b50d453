"""Every mode of the table: what it says of itself holds, and it changes a layer and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import stg_hooks as stg
from stg_hooks.modes.modes import MODES, find_mode
from stg_hooks.modes.perturbation import LayerCall, Perturbation
from tests import zoo
from tests.tiny_models import MODELS


@dataclasses.dataclass(frozen=True)
class Halved(Perturbation):
    """A mode as a contributor writes it: one class, one line in the table."""

    name = "halved"
    needs = "block"

    def __call__(self, call: LayerCall) -> Any:
        """Give half of the output."""
        return call.compute() * 0.5


@pytest.fixture(params=[*MODES, "halved"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(MODES, "halved", Halved())
    return str(request.param)


def tiny(mode: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model that can have a mode, and the arguments of a call."""
    name = "LTX2VideoTransformer3DModel" if find_mode(mode).needs == "streams" else "WanTransformer3DModel"
    return MODELS[name].build(name), MODELS[name].inputs()


def test_a_mode_says_what_it_is(mode: str) -> None:
    found = find_mode(mode)
    assert (found.name, str(found)) == (mode, f"mode={mode!r}")
    assert found.__doc__
    assert find_mode(found) is found
    assert hash(found) == hash(type(found)())
    assert found == type(found)()


@torch.no_grad()
def test_a_mode_changes_its_layer_and_restores_the_model(mode: str) -> None:
    model, inputs = tiny(mode)
    plain, before = model(**inputs)[0], zoo.snapshot(model)
    with stg.skip(model, 1, mode):
        weak = model(**inputs)[0]
        torch.testing.assert_close(model(**inputs)[0], weak, rtol=0.0, atol=0.0)
    assert not torch.allclose(weak, plain, rtol=0.0, atol=1e-3 * plain.std().item())
    assert zoo.snapshot(model) == before
    torch.testing.assert_close(model(**inputs)[0], plain, rtol=0.0, atol=0.0)


@torch.no_grad()
@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_a_guided_call_adds_the_difference(mode: str, execution: str) -> None:
    model, inputs = tiny(mode)
    plain = model(**inputs)[0]
    with stg.skip(model, 1, mode):
        weak = model(**inputs)[0]
    with stg.apply(model, 1, 2.0, mode=mode, batched_cfg=False, execution=execution):
        guided = model(**inputs)[0]
    torch.testing.assert_close(guided, plain + 2.0 * (plain - weak), rtol=1e-4, atol=1e-5)


def test_a_layer_that_lacks_what_a_mode_needs_is_refused(mode: str) -> None:
    model = zoo.FAMILIES["wan"].build()
    if MODES[mode].needs == "layer":
        assert [layer.name for layer in stg.check(model, "blocks.1.ffn", mode)] == ["blocks.1.ffn"]
    elif MODES[mode].needs == "attention":
        told = rf"(?s)FeedForward has no attention for mode='{mode}'.*It can have .*'residual'"
        with pytest.raises(stg.LayerError, match=told):
            stg.skip(model, "blocks.1.ffn", mode)
    else:
        told = rf"mode='{mode}' {MODES[mode].verb} whole blocks.*Did you mean layers=\['blocks.1'\]"
        with pytest.raises(stg.LayerError, match=told):
            stg.skip(model, "blocks.1.attn1", mode)
        told = f"kind='spatial' chooses among .* which mode='{mode}' does not change. Choose from 'attention'"
        with pytest.raises(stg.SettingError, match=told):
            stg.skip(model, 1, mode, kind="spatial")


def test_functions_are_equal_as_modes_where_they_are_the_same() -> None:
    class WithValues:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, call: LayerCall) -> Any:
            return call.compute()

    one, other = WithValues(), WithValues()
    assert find_mode(one) == find_mode(one)
    assert find_mode(one) != find_mode(other)
    assert hash(find_mode(one)) == hash(find_mode(one))
    assert find_mode(len) == find_mode(len) != find_mode(abs)
