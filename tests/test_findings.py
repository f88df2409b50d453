"""What checks have found out about a model is kept for the next `with`, and only while the model stays as it was."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import stg_hooks as stg
from tests import zoo


class Counter:
    """Counts the passes of a model by a block that each of them runs."""

    def __init__(self, model: Any) -> None:
        self.passes = 0
        model.blocks[-1].register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.passes += 1


def passes(model: Any, counter: Counter, calls: int = 1, **settings: Any) -> int:
    before = counter.passes
    with stg.apply(model, layers=[1], scale=1.0, **settings):
        for _ in range(calls):
            model(**zoo.inputs(batch=2))
    return counter.passes - before


@pytest.mark.parametrize("settings", [{"batched_cfg": True}, {"batched_cfg": False}], ids=["cfg", "cond"])
@pytest.mark.parametrize("execution", ["sequential", "batched", "full"])
def test_a_second_with_checks_nothing_again(model: Any, execution: str, settings: dict[str, Any]) -> None:
    counter = Counter(model)
    settings = {**settings, "execution": execution}
    first, second, third = (passes(model, counter, 3, **settings) for _ in range(3))
    assert first > second == third
    assert second == (3 if execution == "batched" else 6)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a forward replaced": lambda model: setattr(model.blocks[0], "forward", lambda *a, **k: _halved(model, *a, **k)),
    "a block replaced": lambda model: model.blocks.__setitem__(0, zoo.build("plain").blocks[0]),
    "a hook": lambda model: model.blocks[0].register_forward_pre_hook(lambda *_: None),
    "an attribute": lambda model: setattr(model, "flag", 7),
    "training": lambda model: model.train(),
}


def _halved(model: Any, *args: Any, **kwargs: Any) -> Any:
    return type(model.blocks[0]).forward(model.blocks[0], *args, **kwargs) * 0.5


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_is_checked_again(model: Any, change: str) -> None:
    counter = Counter(model)
    first, second = passes(model, counter), passes(model, counter)
    CHANGES[change](model)
    assert first > second
    assert passes(model, counter) > second


def _hook(factor: float) -> Callable[..., Tensor]:
    return lambda _module, _args, output: output * factor


def _other_hook(model: Any) -> None:
    model.handle.remove()  # so that the next function may get its address
    model.handle = model.blocks[0].register_forward_hook(_hook(0.5))


RETURNS: dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]] = {
    "a hook in the place of another": (
        lambda model: setattr(model, "handle", model.blocks[0].register_forward_hook(_hook(1.0))),
        _other_hook,
    ),
    "numbers of one hash": (lambda model: setattr(model, "window", -1), lambda model: setattr(model, "window", -2)),
    "numbers that are equal": (lambda model: setattr(model, "on", True), lambda model: setattr(model, "on", 1)),
    "a tuple": (lambda model: setattr(model, "on", (1, [])), lambda model: setattr(model, "on", (2, []))),
    "weights": (lambda _: None, lambda model: model.load_state_dict(zoo.build("plain", 3).state_dict())),
    "a method": (lambda model: setattr(type(model), "run", _run), lambda model: setattr(type(model), "run", _run_more)),
}


def _run(self: Any, block: Any, x: Tensor, text: Tensor) -> Any:
    return block(x, text)


def _run_more(self: Any, block: Any, x: Tensor, text: Tensor) -> Any:
    return block(x, text) * 0.5


@pytest.mark.parametrize("change", RETURNS)
def test_what_takes_the_place_of_something_known_is_new(
    model: Any, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "run", _run)
    before, after = RETURNS[change]
    before(model)
    counter = Counter(model)
    passes(model, counter)
    known = passes(model, counter)
    after(model)
    assert passes(model, counter) > known


def test_gradients_are_another_matter(model: Any) -> None:
    counter = Counter(model)
    with torch.no_grad():
        passes(model, counter)
        known = passes(model, counter)
    assert passes(model, counter) > known == passes(model, counter)


def test_what_is_known_keeps_no_model_alive() -> None:
    model: Any = zoo.build("plain")
    model.blocks[0].parent = [model]  # so that what keeps a block keeps the model
    passes(model, Counter(model))
    passes(model, Counter(model))
    gone = [weakref.ref(model), weakref.ref(model.blocks[0])]
    del model
    gc.collect()
    assert [one() for one in gone] == [None, None]


class ByLevel(zoo.DiT):
    """Leaves a block out at low noise: calls of one layout that go different ways."""

    def forward(self, x: Tensor, text: Tensor, t: float | Tensor = 0.0) -> Tensor:
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            if i != 0 or t > 0.5:
                x = self.run(block, x, text)
        return self.out(x)


@pytest.mark.parametrize("levels", [(0.9, 0.8, 0.2, 0.1), (0.2, 0.1, 0.9), (0.9, 0.1, 0.9, 0.1)])
@pytest.mark.parametrize("execution", ["sequential", "full"])
def test_calls_of_one_layout_that_go_other_ways_are_exact(levels: tuple[float, ...], execution: str) -> None:
    torch.manual_seed(0)
    model: Any = ByLevel()
    calls = [{**zoo.inputs(1), "t": torch.tensor(level)} for level in levels]
    weak = zoo.without(model, ["blocks.2"])
    with warnings.catch_warnings(), stg.apply(model, layers=[2], scale=1.0, batched_cfg=False, execution=execution):
        warnings.simplefilter("error", stg.StgWarning)
        found = [model(**call) for call in calls]
    for call, output in zip(calls, found, strict=True):
        torch.testing.assert_close(output, 2 * model(**call) - weak(**call), rtol=1e-4, atol=1e-5)
