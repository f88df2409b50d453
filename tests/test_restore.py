"""The model afterwards is the model before, however the `with` ended; and inside it was another one."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import zoo
from tests.zoo import snapshot

exact: dict[str, Any] = {"rtol": 0, "atol": 0}
LAYERS = [1, 2]
Inside = Callable[[], object]


class StopTestError(Exception):
    pass


# --- three ways to perturb a model ------------------------------------------------------------------------------------
# Each calls `inside` while the model is perturbed (a Guider's also before), and then the model.


def use_skip(model: nn.Module, inside: Inside) -> None:
    with stg.skip(model, LAYERS):
        inside()
        model(**zoo.inputs())


def use_apply(model: nn.Module, inside: Inside) -> None:
    with stg.apply(model, LAYERS, 1.0):
        inside()
        model(**zoo.inputs())


def use_guider(model: nn.Module, inside: Inside) -> None:
    def denoiser(**inputs: Tensor) -> Tensor:
        inside()
        return model(**inputs)

    stg.Guider(denoiser, LAYERS, 1.0, model=model)(**zoo.inputs())


WAYS = {"skip": use_skip, "apply": use_apply, "guider": use_guider}
ways = pytest.mark.parametrize("use", WAYS.values(), ids=WAYS.keys())


@pytest.fixture
def model() -> nn.Module:
    return zoo.build("plain")


@pytest.fixture(autouse=True)
def unchanged(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What every test of this file asserts: the model is what it was, and computes what it did."""
    before, plain = snapshot(model), model(**zoo.inputs())
    yield before
    assert snapshot(model) == before
    assert_close(model(**zoo.inputs()), plain, **exact)


# --- the ways out -----------------------------------------------------------------------------------------------------


@ways
def test_after_success(use: Callable[..., None], model: nn.Module, unchanged: dict[str, Any]) -> None:
    inside: list[dict[str, Any]] = []
    use(model, lambda: inside.append(snapshot(model)))
    assert inside[-1] != unchanged
    changed = {name for name in unchanged["modules"] if inside[-1]["modules"][name] != unchanged["modules"][name]}
    assert {"blocks.1", "blocks.2"} <= changed
    assert use is not use_skip or changed == {"", "blocks.1", "blocks.2"}
    for part in ("classes", "classes of modules", "global hooks", "state_dict"):
        assert inside[-1][part] == unchanged[part]


@pytest.mark.parametrize("error", [StopTestError, KeyboardInterrupt])
@ways
def test_after_an_exception_in_the_body(
    use: Callable[..., None], error: type[BaseException], model: nn.Module, unchanged: dict[str, Any]
) -> None:
    def stop() -> None:
        if snapshot(model) != unchanged:  # which must happen, or nothing is raised
            raise error

    with pytest.raises(error):
        use(model, stop)


@pytest.mark.parametrize("error", [StopTestError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["blocks.0", "blocks.2", "blocks.3.attn"])
@pytest.mark.parametrize("way", ["skip", "apply", "guider"])
def test_after_an_exception_in_a_block(way: str, name: str, error: type[BaseException], model: nn.Module) -> None:
    """Raised in the prefix, in a skipped layer and behind it; there in the second pass too."""
    if way == "skip" and name == "blocks.2":
        return  # a bypassed block does not run
    target = model.get_submodule(name)
    plain_forward = type(target).forward
    for passes in (1, 2):
        if passes == 2 and (way == "skip" or name != "blocks.3.attn"):
            continue  # only what lies behind the skipped layers runs in both passes
        calls = zoo.Log()

        def forward(*args: Any, calls: zoo.Log = calls, passes: int = passes, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == passes:
                raise error
            return plain_forward(target, *args, **kwargs)

        target.forward = forward
        before = snapshot(model)
        with pytest.raises(error):
            WAYS[way](model, lambda: None)
        assert snapshot(model) == before
        del target.forward


def test_a_skip_that_was_interrupted_can_be_entered_again(model: nn.Module) -> None:
    """An interrupt passes by the hook that ends a call; nothing of that call may count in the next `with`."""
    expected, plain = zoo.without(model, ["blocks.1", "blocks.2"])(**zoo.inputs()), model.blocks[1](**zoo.inputs())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    skip = stg.skip(model, LAYERS)
    with model.blocks[3].register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt), skip:
        model(**zoo.inputs())
    with skip:
        assert_close(model.blocks[1](**zoo.inputs()), plain, **exact)
        assert_close(model(**zoo.inputs()), expected, **exact)


@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")  # not the matter here: what they compute together
@ways
def test_after_nesting_in_each_other(use: Callable[..., None], model: nn.Module, unchanged: dict[str, Any]) -> None:
    for other in WAYS.values():
        seen: list[bool] = []
        use(model, lambda other=other, seen=seen: other(model, lambda: seen.append(snapshot(model) != unchanged)))
        assert any(seen)


@pytest.mark.parametrize("make", [lambda m: stg.skip(m, LAYERS), lambda m: stg.apply(m, LAYERS, 1.0)])
def test_after_entering_again(make: Callable[[nn.Module], Any], model: nn.Module, unchanged: dict[str, Any]) -> None:
    session, weak = make(model), zoo.without(model, ["blocks.1", "blocks.2"])(**zoo.inputs())
    expected = weak if isinstance(session, stg.skip) else 2 * model(**zoo.inputs()) - weak
    for _ in range(2):
        with session as entered:
            assert entered is session
            with session:
                assert_close(model(**zoo.inputs()), expected)
                assert snapshot(model) != unchanged
            assert snapshot(model) != unchanged
            assert_close(model(**zoo.inputs()), expected)
        assert snapshot(model) == unchanged


@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")
def test_after_leaving_in_the_wrong_order(model: nn.Module, unchanged: dict[str, Any]) -> None:
    sessions = [stg.skip(model, LAYERS), stg.apply(model, [2, 3], 1.0), stg.skip(model, [1])]
    for session in sessions:
        session.__enter__()
    model(**zoo.inputs())
    for session in sessions:
        assert snapshot(model) != unchanged
        session.__exit__(None, None, None)


@pytest.mark.parametrize("make", [lambda m: stg.skip(m, LAYERS), lambda m: stg.apply(m, LAYERS, 1.0)])
def test_after_a_generator_was_abandoned(
    make: Callable[[nn.Module], Any], model: nn.Module, unchanged: dict[str, Any]
) -> None:
    def steps() -> Iterator[Tensor]:
        with make(model):
            while True:
                yield model(**zoo.inputs())

    generator = steps()
    next(generator)
    assert snapshot(model) != unchanged
    del generator
    gc.collect()
    assert snapshot(model) == unchanged

    # Started in one context and ended in another: there is nothing to leave there, but all the more to restore.
    generator = steps()
    contextvars.copy_context().run(next, generator)
    assert snapshot(model) != unchanged
    generator.close()


def test_after_a_guider_that_was_built_and_never_called(model: nn.Module, unchanged: dict[str, Any]) -> None:
    kept = [stg.Guider(model, LAYERS), stg.skip(model, LAYERS), stg.apply(model, LAYERS)]
    assert snapshot(model) == unchanged
    del kept


# --- copies made inside -----------------------------------------------------------------------------------------------


@ways
def test_a_copy_made_inside_can_be_perturbed_itself(use: Callable[..., None], model: nn.Module) -> None:
    expected = zoo.without(model, ["blocks.3"])(**zoo.inputs())
    copies: list[nn.Module] = []
    use(model, lambda: copies.append(copy.deepcopy(model)))
    before = snapshot(copies[-1])
    with stg.skip(copies[-1], [3]):
        assert_close(copies[-1](**zoo.inputs()), expected, **exact)
    assert snapshot(copies[-1]) == before


def test_a_copy_of_a_wrapped_block_keeps_the_wrapper(model: nn.Module) -> None:
    log: list[str] = []
    wrap(model.blocks[1], log)
    with stg.skip(model, [1]):
        model(**zoo.inputs())
        copied = copy.deepcopy(model)
    assert log == []
    copied(**zoo.inputs())
    assert log == ["called"]
    unwrap(model.blocks[1])


@pytest.mark.parametrize("training", [False, True])
@ways
def test_training_modes_are_kept(use: Callable[..., None], training: bool, model: nn.Module) -> None:
    model.blocks[2].train(training)
    before = [module.training for module in model.modules()]
    inside: list[list[bool]] = []
    use(model, lambda: inside.append([module.training for module in model.modules()]))
    assert inside[-1] == before == [module.training for module in model.modules()]
    model.eval()


# --- what others have put on the instance (trap 11) -------------------------------------------------------------------


def wrap(module: nn.Module, log: list[str] | zoo.Log) -> None:
    """Wrap `forward` on the instance, as accelerate does."""
    old = module.forward
    module._old_forward = old

    def forward(wrapped: nn.Module, *args: Any, **kwargs: Any) -> Any:
        log.append("called")
        return wrapped._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(forward, module), old)


def unwrap(module: nn.Module) -> None:
    del module.forward, module._old_forward


@ways
def test_a_forward_put_on_the_instance_before_is_kept_and_called(use: Callable[..., None], model: nn.Module) -> None:
    logs = {name: zoo.Log() for name in ("", "blocks.0", "blocks.1")}
    for name, log in logs.items():
        wrap(model.get_submodule(name), log)
    before = snapshot(model)
    inside: list[bool] = []
    use(model, lambda: inside.append(snapshot(model) != before))
    assert inside[-1]
    assert logs[""]
    assert logs["blocks.0"]
    # In the cond pass, in the one that checks once what can be shared, in two more as `forward` was replaced by others,
    # and not in the weak one.
    assert len(logs["blocks.1"]) == (0 if use is use_skip else 4)
    assert snapshot(model) == before
    for name, log in logs.items():
        log.taken()
        model(**zoo.inputs())
        assert log
        unwrap(model.get_submodule(name))


def test_a_callable_mode_computes_through_the_wrapper(model: nn.Module) -> None:
    log: list[str] = []
    plain = model(**zoo.inputs())
    wrap(model.blocks[1], log)
    with stg.skip(model, [1], mode=lambda call: call.compute()):
        assert_close(model(**zoo.inputs()), plain, **exact)
    assert log == ["called"]
    unwrap(model.blocks[1])


def test_a_forward_put_on_top_inside_survives_and_works(model: nn.Module) -> None:
    log: list[str] = []
    plain, weak = model(**zoo.inputs()), zoo.without(model, ["blocks.1"])(**zoo.inputs())
    with stg.skip(model, [1]):
        wrap(model.blocks[1], log)
        wrapper = model.blocks[1].forward
        assert_close(model(**zoo.inputs()), weak, **exact)
        assert len(log) == 1
    assert model.blocks[1].__dict__["forward"] is wrapper
    assert_close(model(**zoo.inputs()), plain, **exact)
    assert len(log) == 2
    with stg.skip(model, [1]):
        assert_close(model(**zoo.inputs()), weak, **exact)
    assert model.blocks[1].__dict__["forward"] is wrapper
    assert_close(model(**zoo.inputs()), plain, **exact)
    unwrap(model.blocks[1])


def test_accelerates_own_hooks_are_kept_and_called(model: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    log: list[nn.Module] = []

    class Log(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            log.append(module)
            return args, kwargs

    expected = zoo.without(model, ["blocks.1"])(**zoo.inputs())
    hooks.add_hook_to_module(model.blocks[1], Log())
    before = snapshot(model)
    with stg.skip(model, [1]):
        assert_close(model(**zoo.inputs()), expected, **exact)
        assert log == []
    assert snapshot(model) == before
    model(**zoo.inputs())
    assert log == [model.blocks[1]]
    with stg.skip(model, [1]):
        hooks.add_hook_to_module(model.blocks[2], Log())
        model(**zoo.inputs())
    assert log == [model.blocks[1], model.blocks[2]]
    for block in (model.blocks[1], model.blocks[2]):
        hooks.remove_hook_from_module(block)
        del block.forward  # accelerate leaves the bound method behind


# --- threads and tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [stg.apply, stg.skip])
def test_a_task_that_outlives_the_with(use: Any, model: nn.Module) -> None:
    inputs = zoo.inputs()
    plain, weak = model(**inputs), zoo.without(model, ["blocks.1"])(**inputs)
    inside = weak if use is stg.skip else 2 * plain - weak

    async def run() -> None:
        left, again = asyncio.Event(), asyncio.Event()

        async def child() -> None:
            assert_close(model(**inputs), inside)
            left.set()
            await again.wait()
            assert_close(model(**inputs), plain, **exact)

        session = use(model, [1])
        with session:
            task = asyncio.create_task(child())
            await left.wait()
        with session:  # the same object, but not the `with` in which the task was started
            again.set()
            await task
            assert_close(model(**inputs), inside)

    asyncio.run(run())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["skip", "apply", "guider"])
def test_a_thousand_times_leave_nothing_behind(way: str, model: nn.Module) -> None:
    times = 1000

    def enter_and_leave(times: int) -> tuple[int, int]:
        for _ in range(times):
            WAYS[way](model, lambda: None)
        gc.collect()
        return len(gc.get_objects()), sys.getallocatedblocks()

    enter_and_leave(20)  # what is cached is cached by now
    before = enter_and_leave(20)
    objects, blocks = (after - before for after, before in zip(enter_and_leave(times), before, strict=True))
    assert objects < 10
    assert blocks < 2 * times  # which wavers by some hundreds


# --- the proof can fail -----------------------------------------------------------------------------------------------


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def _forward(module: nn.Module) -> None:
    module.forward = module.forward


def _class(module: nn.Module) -> None:
    module.__class__ = type("Block", (type(module),), {})


def _parameter(module: nn.Module) -> None:
    module.ff.weight = nn.Parameter(module.ff.weight.clone())


def _buffer(module: nn.Module) -> None:
    module.register_buffer("step", torch.zeros(1))


@pytest.mark.parametrize("change", [_hook, _forward, _class, _parameter, _buffer, nn.Module.train])
def test_the_snapshot_sees(change: Callable[[nn.Module], object]) -> None:
    model = zoo.build("plain")
    before = snapshot(model)
    assert snapshot(model) == before
    change(model.blocks[1])
    assert snapshot(model) != before


def test_the_snapshot_sees_a_patched_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("plain")
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        assert snapshot(model) != before
    assert snapshot(model) == before
