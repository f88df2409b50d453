"""Threads, tasks and generators that share a model: each of them gets what it asked for, and nobody else notices."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import pipelines, zoo

close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
Make = Callable[[], Tensor]


@pytest.fixture
def model() -> Iterator[nn.Module]:
    model = zoo.build("plain")
    before = zoo.snapshot(model)
    yield model
    assert zoo.snapshot(model) == before


def weak(model: nn.Module, *layers: int) -> Tensor:
    return zoo.without(model, [f"blocks.{layer}" for layer in layers])(**zoo.inputs())


@contextmanager
def changing_threads_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_threads(jobs: list[tuple[Make, Tensor]], times: int) -> None:
    """Start all jobs at once, and check every result of every call."""
    start = threading.Barrier(len(jobs), timeout=120)

    def run(make: Make, expected: Tensor) -> None:
        start.wait()
        for _ in range(times):
            assert_close(make(), expected, **close)

    with changing_threads_often(), ThreadPoolExecutor(len(jobs)) as pool:
        for result in [pool.submit(run, *job) for job in jobs]:
            result.result()


# --- threads ----------------------------------------------------------------------------------------------------------


def kinds(model: nn.Module) -> list[tuple[Make, Tensor]]:
    """Eight ways to use a model, no two alike, and what each has to give."""
    inputs = zoo.inputs()
    plain, one, two = model(**inputs), weak(model, 1), weak(model, 2)
    guider = stg.Guider(model, [2], 1.5, guidance_scale=3.0)
    x, text = inputs.values()
    uncond = model(x, 0 * text)

    def applied(layer: int, scale: float, **settings: Any) -> Tensor:
        with stg.apply(model, [layer], scale, **settings):
            return model(**inputs)

    def skipped(layer: int) -> Tensor:
        with stg.skip(model, [layer]):
            return model(**inputs)

    def nested() -> Tensor:
        with stg.skip(model, [1]), stg.apply(model, [2], 0.5):
            return model(**inputs)

    return [
        (lambda: model(**inputs), plain),
        (lambda: applied(1, 1.0), plain + (plain - one)),
        (lambda: applied(2, 2.0, execution="full"), plain + 2.0 * (plain - two)),
        (lambda: applied(2, 0.5, execution="batched"), plain + 0.5 * (plain - two)),
        (lambda: skipped(1), one),
        (lambda: skipped(2), two),
        (nested, one + 0.5 * (one - weak(model, 1, 2))),
        (
            lambda: guider(x, cond={"text": text}, uncond={"text": 0 * text}),
            uncond + 3.0 * (plain - uncond) + 1.5 * (plain - two),
        ),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
def test_eight_threads_of_200_calls(model: nn.Module) -> None:
    in_threads(kinds(model), 200)


@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
def test_eight_threads(model: nn.Module) -> None:
    in_threads(kinds(model), 15)


def test_threads_that_share_one_guider_whose_layers_change(model: nn.Module) -> None:
    """A schedule asks each thread's step for other layers, which nobody knew of before the run."""
    inputs = zoo.inputs()
    plain = model(**inputs)
    current = threading.local()
    guider = stg.Guider(model, [1], schedule=lambda step: {"layers": [current.layer]})

    def run(layer: int) -> Tensor:
        current.layer = layer
        return guider(**inputs)

    in_threads([(lambda layer=layer: run(layer), 2 * plain - weak(model, layer)) for layer in (0, 1, 2, 3)], 15)


@pytest.mark.parametrize("use", [stg.apply, stg.skip])
def test_threads_that_share_one_session(use: Any, model: nn.Module) -> None:
    """The same object, entered in several threads; and a thread that is started inside and has not entered it."""
    inputs = zoo.inputs()
    plain = model(**inputs)
    shared = use(model, [1])

    def run() -> Tensor:
        with shared:
            return model(**inputs)

    inside = weak(model, 1) if use is stg.skip else 2 * plain - weak(model, 1)
    in_threads([(run, inside), (run, inside), (run, inside), (lambda: model(**inputs), plain)], 15)


@pytest.mark.parametrize("family", ["wan", pytest.param("ltx", marks=pytest.mark.slow)])
def test_two_pipelines_of_one_denoiser(family: str) -> None:
    """One guided, one not; then both, with different settings; one after the other and in two threads at once."""
    pipe, call, case = pipelines.build(family)
    other = pipelines.build_pipeline(case, pipe.transformer)
    call = {**call, "num_inference_steps": 2}

    def run(which: Any, *settings: Any) -> Tensor:
        if not settings:
            return pipelines.run(which, call)
        with stg.apply(which, *settings):
            return pipelines.run(which, call)

    plain, one, two = run(pipe), run(pipe, [1], 1.0), run(pipe, [2], 0.5)
    assert not torch.equal(plain, one)
    assert not torch.equal(one, two)
    with stg.apply(pipe, [1], 1.0):
        assert torch.equal(run(other), plain)
        assert torch.equal(run(other, [2], 0.5), two)
        assert torch.equal(run(pipe), one)
    third = pipelines.build_pipeline(case, pipe.transformer)
    in_threads(
        [(lambda: run(pipe, [1], 1.0), one), (lambda: run(other, [2], 0.5), two), (lambda: run(third), plain)], 2
    )


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [stg.apply, stg.skip])
def test_tasks_that_take_turns(use: Any, model: nn.Module) -> None:
    """A `with` counts in the task that entered it and in those it starts, threads of theirs included."""
    inputs = zoo.inputs()
    plain = model(**inputs)
    weaks = {layer: weak(model, layer) for layer in (1, 2)}
    inside, nested = weaks, {layer: weak(model, layer, 3) for layer in weaks}
    if use is stg.apply:
        inside = {layer: 2 * plain - weaks[layer] for layer in weaks}
        nested = {layer: 2 * weak(model, 3) - nested[layer] for layer in weaks}

    async def check(expected: Tensor) -> None:
        for _ in range(4):
            assert_close(model(**inputs), expected, **close)
            await asyncio.sleep(0)

    async def enter(layer: int) -> None:
        with use(model, [layer]):
            await check(inside[layer])
            await asyncio.gather(check(inside[layer]), check(inside[layer]))
            assert_close(await asyncio.to_thread(model, **inputs), inside[layer], **close)
            with stg.skip(model, [3]):
                await check(nested[layer])
        await check(plain)

    async def run() -> None:
        await asyncio.gather(enter(1), check(plain), enter(2), check(plain), enter(1))

    asyncio.run(run())


# --- overlapping ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")
@pytest.mark.parametrize("seed", range(4))
def test_entered_and_left_in_any_order(seed: int, model: nn.Module) -> None:
    """At every moment the prediction is that of the skips and guidance that are in force, whoever came first."""
    inputs, choose = zoo.inputs(), random.Random(seed)
    skips = {layer: stg.skip(model, [layer]) for layer in (0, 1)}
    guides = {
        layer: stg.apply(model, [layer], 0.5, execution=choose.choice(["full", "sequential"])) for layer in (2, 3)
    }
    inside: set[int] = set()

    def expected() -> Tensor:
        skipped = [layer for layer in inside if layer in skips]
        cond = weak(model, *skipped)
        return cond + sum(0.5 * (cond - weak(model, *skipped, layer)) for layer in inside if layer in guides)

    reference, plain_model = [], model
    with ExitStack() as stack:
        stack.callback(lambda: [{**skips, **guides}[layer].__exit__(None, None, None) for layer in sorted(inside)])
        for _ in range(12):
            layer = choose.choice([0, 1, 2, 3])
            session = {**skips, **guides}[layer]
            if layer in inside:
                session.__exit__(None, None, None)
                inside.remove(layer)
            else:
                session.__enter__()
                inside.add(layer)
            reference.append(expected())  # of copies, which nothing is installed on
            assert_close(plain_model(**inputs), reference[-1], **close)
    assert len({tuple(r.flatten().tolist()) for r in reference}) > 2


def test_a_denoiser_that_is_guided_inside_another(model: nn.Module) -> None:
    """A model that calls a guided model, and is guided itself."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.blocks = nn.ModuleList(zoo.Block() for _ in range(2))

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            x = self.inner(x, text)
            for block in self.blocks:
                x = block(x, text)
            return x

    outer, (x, text) = Outer().eval().requires_grad_(False), zoo.inputs().values()

    def after(inner: Tensor, blocks: list[int]) -> Tensor:
        for i in blocks:
            inner = outer.blocks[i](inner, text)
        return inner

    plain, bypassed = model(x, text), weak(model, 2)
    guided = plain + (plain - bypassed)
    with stg.apply(model, [2]):
        assert_close(outer(x, text), after(guided, [0, 1]), **close)
    with stg.apply(outer, ["blocks.0"]):
        assert_close(outer(x, text), 2 * after(plain, [0, 1]) - after(plain, [1]), **close)


def test_reentrancy(model: nn.Module) -> None:
    """The same objects, entered again inside themselves, and called from their own hooks."""
    inputs = zoo.inputs()
    plain = model(**inputs)
    guider = stg.Guider(model, [1])
    seen: list[Tensor] = []

    def once(*_: Any) -> None:
        if not seen:
            seen.append(plain)
            seen.append(guider(**inputs))

    handle = model.blocks[3].register_forward_hook(once)
    result = guider(**inputs)
    handle.remove()
    expected = 2 * plain - weak(model, 1)
    assert_close(result, expected, **close)
    assert_close(seen[1], expected, **close)
    session = stg.skip(model, [1])
    with session, session:
        assert_close(model(**inputs), weak(model, 1), **close)
