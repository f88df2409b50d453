"""Models that keep state between calls: a weak pass leaves none behind, and reuses what the weak model would have."""

from __future__ import annotations

import contextvars
import copy
import functools
import itertools
import random
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests import zoo

WIDTH, SKIPPED = 8, 2
COUNTS: dict[str, Any] = {"calls": 0, "kept": []}
TOTAL = 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.ff = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.mix(x))
        return x + torch.tanh(self.ff(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.run(x + t.view(-1, 1, 1)))

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def every_other(self: Any, x: Tensor, t: Tensor) -> Tensor:
    """As people add TeaCache: `forward` of the model replaced, counter and residuals kept on the model."""
    x = x + t.view(-1, 1, 1)
    if self.count % 2:
        x = x + self.residual[0]
    else:
        before = x
        x = self.run(x)
        self.residual[0] = x - before
    self.count = (self.count + 1) % 6
    return self.out(x)


def teacache() -> nn.Module:
    model = Net()
    model.count, model.residual = 0, {}
    model.forward = types.MethodType(every_other, model)
    return model


class Threshold(Net):
    """Reuses its residual until the accumulated distance of its inputs is large."""

    previous: Tensor | None = None
    residual: Tensor | None = None
    distance = 0.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + t.view(-1, 1, 1)
        if self.previous is not None:
            self.distance += float((t - self.previous).abs().mean())
        reuses = self.residual is not None and 0 < self.distance < 0.25 and float(t[0]) < 0.99
        self.previous = t.clone()
        if reuses:
            return self.out(x + self.residual)
        self.distance, before = 0.0, x
        x = self.run(x)
        self.residual = x - before
        return self.out(x)


class Attending(Block):
    """Broadcasts its attention over steps, as Pyramid Attention Broadcast does."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.cached = 0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.count % 2 == 0:
            self.cached = torch.tanh(self.mix(x))
        self.count = (self.count + 1) % 6
        x = x + self.cached
        return x + torch.tanh(self.ff(x))


def broadcast() -> nn.Module:
    model = Net()
    model.blocks = nn.ModuleList(Attending() for _ in range(4))
    return model


class History(Net):
    """Keeps what it has seen, in a tensor that it writes into."""

    def __init__(self, only_clean: bool) -> None:
        super().__init__()
        self.kv = [torch.zeros(1, 4, WIDTH) for _ in range(4)]
        self.only_clean = only_clean

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + t.view(-1, 1, 1)
        for kept, block in zip(self.kv, self.blocks, strict=True):
            x = block(x + 0.3 * kept)
            if not self.only_clean or float(t[0]) < 0.2:
                kept.copy_(0.5 * kept[:1] + 0.5 * x[-1:])
        return self.out(x)


class InHelper(Net):
    """Keeps its state in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = types.SimpleNamespace(n=0, seen=[], shift=torch.zeros(WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        helper = self.helper
        x = self.run(x + t.view(-1, 1, 1) + helper.shift)
        helper.n += 1
        helper.seen.append(x.mean((0, 1)).detach())
        helper.shift = 0.1 * helper.seen[-1] + 0.01 * helper.n
        return self.out(x)


class RunningMean(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.run(x + t.view(-1, 1, 1) - self.mean)
        self.mean.lerp_(x.mean((0, 1)).detach(), 0.3)
        return self.out(x)


class OfClass(Net):
    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        OfClass.calls += 1
        return super().forward(x, t) * (1 + OfClass.calls % 3)


class OfModule(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        global TOTAL
        TOTAL += 1
        COUNTS["calls"] += 1
        COUNTS["kept"].append(x.mean())
        return super().forward(x, t) * (1 + COUNTS["calls"] % 3 + TOTAL % 2) + COUNTS["kept"][0]


def in_closure() -> nn.Module:
    model, calls, kept = Net(), 0, {}
    plain = model.forward

    def forward(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        kept[calls % 2] = x.mean()
        return plain(x, t) * calls + kept.get((calls + 1) % 2, 0)

    model.forward = forward
    return model


class Controller:
    """Counts the attention calls of a step, as prompt-to-prompt does, and keeps their maps."""

    def __init__(self) -> None:
        self.cur_step, self.layer, self.maps = 0, 0, []

    def __call__(self, x: Tensor) -> Tensor:
        self.layer += 1
        self.maps.append(x.mean((0, 1)).detach())
        x = x * (1 + 0.1 * self.cur_step)
        if self.layer == 4:
            self.layer, self.cur_step, self.maps = 0, self.cur_step + 1, []
        return x


class Controlled(Block):
    controller: Controller

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.controller(x))


def controlled() -> nn.Module:
    model, controller = Net(), Controller()
    model.blocks = nn.ModuleList(Controlled() for _ in range(4))
    for block in model.blocks:
        block.controller = controller
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "TeaCache": teacache,
    "TeaCache with a threshold": Threshold,
    "attention broadcast": broadcast,
    "keys and values of every call": functools.partial(History, False),
    "keys and values of clean calls": functools.partial(History, True),
    "an object": InHelper,
    "a buffer": RunningMean,
    "a class": OfClass,
    "a module of Python": OfModule,
    "a closure": in_closure,
    "an attention controller": controlled,
}
CACHES = ("TeaCache", "TeaCache with a threshold", "attention broadcast")
EXECUTIONS = ("auto", "full", "batched")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stg.StgWarning)
        yield


def reset() -> None:
    global TOTAL
    OfClass.calls = TOTAL = 0
    COUNTS.update(calls=0, kept=[])


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def run(predict: Callable[..., Tensor], rows: int = 1) -> Tensor:
    x = torch.randn(rows, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in (1.0, 0.85, 0.7, 0.4, 0.3, 0.1):
            x = x - 0.3 * predict(x, torch.full((rows,), t))
    return x


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_own_passes_and_runs_afterwards_are_plain(name: str, execution: str, rows: int) -> None:
    plain = made(name)
    want = run(plain, rows), run(plain, rows)
    reset()
    model = made(name)
    with stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1e-9, execution=execution, batched_cfg=rows == 2):
        got = run(model, rows)
    if name == "keys and values of clean calls" and execution == "batched":  # whose own rows agree to rounding
        torch.testing.assert_close(got, want[0])
        return
    assert torch.equal(got, want[0])
    assert torch.equal(run(model, rows), want[1])


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_weak_pass_leaves_nothing_behind(
    name: str, execution: str, error: type[BaseException]
) -> None:
    plain = made(name)
    x, t = torch.ones(1, 4, WIDTH), torch.ones(1)
    with torch.no_grad():
        plain(x, t)
    want = run(plain)
    reset()
    model = made(name)
    handle: Any = None

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        if fail.calls:
            raise error
        fail.calls += 1

    fail.calls = 0
    handle = model.out.register_forward_hook(fail)
    with (
        pytest.raises(error),
        stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1.0, execution=execution, batched_cfg=False),
        torch.no_grad(),
    ):
        model(x, t)
    handle.remove()
    assert torch.equal(run(model), want)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_two_models(name: str, execution: str) -> None:
    plain = made(name)
    weak = copy.deepcopy(plain)
    if name == "TeaCache":
        weak.forward = types.MethodType(every_other, weak)
    weak.blocks[SKIPPED].forward = lambda x: x

    def textbook(x: Tensor, t: Tensor) -> Tensor:
        if name in CACHES:
            w = weak(x, t)
            c = plain(x, t)
        elif name in ("a closure", "a class", "a module of Python"):
            w, c = twice(plain, x, t)
        else:
            weak.__dict__.update({k: v for k, v in copy.deepcopy(plain).__dict__.items() if k in ("kv", "helper")})
            weak._buffers.update(copy.deepcopy(plain)._buffers)
            if name == "an attention controller":
                state = copy.deepcopy(plain.blocks[0].controller)
                for block in weak.blocks:
                    block.controller = state
            w, c = weak(x, t), plain(x, t)
        return c + 1.5 * (c - w)

    want = run(textbook)
    reset()
    model = made(name)
    with stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1.5, execution=execution, batched_cfg=False):
        got = run(model)
    torch.testing.assert_close(got, want)
    reset()
    assert not torch.allclose(run(made(name)), want, rtol=1e-3)


def twice(plain: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Make a call of a model without its layer and put back, by hand, what that has changed; and the call itself."""
    cells = dict(zip(plain.forward.__code__.co_freevars, plain.forward.__closure__ or (), strict=False))
    before = (OfClass.calls, TOTAL, COUNTS["calls"], list(COUNTS["kept"]))
    inner = {name: copy.copy(cell.cell_contents) for name, cell in cells.items() if name in ("calls", "kept")}
    block = plain.blocks[SKIPPED]
    block.forward = lambda x: x
    weak = plain(x, t)
    del block.forward
    OfClass.calls, globals()["TOTAL"], COUNTS["calls"], COUNTS["kept"] = before
    for name, value in inner.items():
        if name == "kept":
            cells[name].cell_contents.clear()
            cells[name].cell_contents.update(value)
        else:
            cells[name].cell_contents = value
    return weak, plain(x, t)


class Iterating(Net):
    """Counts in an object that cannot be looked into."""

    def __init__(self, start: Callable[[], Iterator[int]], period: int) -> None:
        super().__init__()
        self.counter, self.period = start(), period

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * (1 + next(self.counter) % self.period)


@pytest.mark.parametrize("period", [2, 3, 100])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("start", [itertools.count, lambda: (i for i in range(1000))], ids=["count", "generator"])
def test_state_out_of_reach_is_refused(start: Callable[[], Iterator[int]], execution: str, period: int) -> None:
    torch.manual_seed(0)
    model = Iterating(start, period)
    with (
        pytest.raises(stg.CallError, match="cannot be put back"),
        stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1.0, execution=execution, batched_cfg=False),
    ):
        run(model)


class Scaled(Net):
    """Multiplies what it predicts by a number that something out of reach gives."""

    def __init__(self, start: Callable[[], Callable[[], float]]) -> None:
        super().__init__()
        self.number = start()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * (1 + self.number())


def of_a_generator() -> Callable[[], float]:
    generator = torch.Generator().manual_seed(0)
    return lambda: float(torch.rand((), generator=generator))


def of_python() -> Callable[[], float]:
    return random.Random(0).random


def of_a_context() -> Callable[[], float]:
    number: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)

    def count() -> float:
        number.set(number.get() + 1)
        return float(number.get() % 3)

    return count


def of_numpy() -> Callable[[], float]:
    numbers = np.zeros(1)

    def count() -> float:
        numbers[0] += 1
        return float(numbers[0])

    return count


def of_a_parameter() -> Callable[[], float]:
    parameter = nn.Parameter(torch.zeros(()), requires_grad=False)
    return lambda: float(parameter.add_(1))


def assert_refused(error: stg.CallError) -> None:
    assert "cannot be put back" in str(error)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("start", [of_a_generator, of_python, of_a_context, of_numpy, of_a_parameter])
def test_what_is_right_or_refused(start: Callable[[], Callable[[], float]], execution: str) -> None:
    torch.manual_seed(0)
    plain = Scaled(start)
    want = run(plain), run(plain)
    torch.manual_seed(0)
    model = Scaled(start)
    try:
        with stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1e-9, execution=execution, batched_cfg=False):
            got = run(model)
    except stg.CallError as error:
        assert_refused(error)
    else:
        assert torch.equal(got, want[0])
        assert torch.equal(run(model), want[1])


class Scaling:
    """An object whose methods are hooks, as attention controllers are."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        self.calls += 1
        return (output or args)[0] * (1 + self.calls % 3)

    def written(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        self.calls += 1
        (output or args)[0].mul_(1 + self.calls % 3)


def count_of() -> Callable[..., Any]:
    calls = 0

    def count(module: nn.Module, args: tuple[Any, ...], *output: Any) -> Any:
        nonlocal calls
        calls += 1
        return (output or args)[0] * (1 + calls % 3)

    return count


HOOKS = {"function": count_of, "object": Scaling, "method": lambda: Scaling().__call__}
HOOKS["in place"] = lambda: Scaling().written


@pytest.mark.parametrize("block", [0, SKIPPED, 3])
@pytest.mark.parametrize("kind", ["pre_hook", "hook"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_counts_is_refused(hook: str, kind: str, block: int) -> None:
    torch.manual_seed(0)
    model = Net()
    of = model.blocks[block]
    getattr(of, f"register_forward_{kind}")(HOOKS[hook]())
    with (
        pytest.raises(stg.CallError, match=rf"blocks\.{block} has the hook "),
        stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1.0, batched_cfg=False),
    ):
        run(model)


def looking(seen: list[Any]) -> Callable[..., None]:
    def look(module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        if len(args) > 1:
            return
        seen.append(args)

    return look


@pytest.mark.parametrize("kind", ["pre_hook", "hook"])
@pytest.mark.parametrize("look", [looking, lambda seen: lambda *call: seen.append(call[1][0].clone())])
def test_a_hook_that_only_looks_costs_no_pass_more(kind: str, look: Callable[[list[Any]], Any]) -> None:
    torch.manual_seed(0)
    model, seen = Net(), list[Any]()
    getattr(model.blocks[3], f"register_forward_{kind}")(look(seen))
    with stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1.0, batched_cfg=False):
        run(model)
    assert 12 <= len(seen) <= 14  # six steps, and what checks the first


class Passed:
    """A cache that is an argument of the call."""

    def __init__(self) -> None:
        self.calls = 0


def test_an_object_among_the_arguments_that_changes_is_refused() -> None:
    class Taking(Net):
        def forward(self, x: Tensor, t: Tensor, cache: Passed) -> Tensor:
            cache.calls += 1
            return super().forward(x, t) * cache.calls

    torch.manual_seed(0)
    model, cache = Taking(), Passed()
    with (
        pytest.raises(stg.CallError, match="cannot be put back"),
        stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1.0, batched_cfg=False),
    ):
        run(functools.partial(model, cache=cache))


def test_guidance_that_begins_where_a_cache_is_reused_is_refused() -> None:
    torch.manual_seed(0)
    model = teacache()
    x, t = torch.ones(1, 4, WIDTH), torch.ones(1)
    with torch.no_grad():
        model(x, t)
    with (
        pytest.raises(stg.CallError, match="reuses"),
        stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1.0, batched_cfg=False),
        torch.no_grad(),
    ):
        model(x, t)


def test_guidance_that_began_where_attention_was_reused_is_told() -> None:
    model = made("attention broadcast")
    x, t = torch.ones(1, 4, WIDTH), torch.ones(1)
    with torch.no_grad():
        model(x, t)
    with stg.apply(model, layers=[f"blocks.{SKIPPED}"], scale=1.0, batched_cfg=False), torch.no_grad():
        model(x, t)
        with pytest.warns(stg.StgWarning, match="computes more in this call than in those before"):
            model(x, t)


@pytest.mark.parametrize("name", ["TeaCache", "keys and values of every call", "a buffer", "an object"])
def test_guider(name: str) -> None:
    want = run(made(name))
    model = made(name)
    got = run(stg.Guider(model, layers=[f"blocks.{SKIPPED}"], scale=1e-9))
    assert torch.equal(got, want)


def test_the_deepcache_package() -> None:
    """Its cache lies in a helper that replaced forwards close over. The reference: two pipelines with a helper each."""
    package = pytest.importorskip("DeepCache")
    diffusers = pytest.importorskip("diffusers")

    def pipeline() -> Any:
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        pipe = diffusers.StableDiffusionPipeline(
            **dict.fromkeys(names),
            unet=zoo.FAMILIES["unet2d"].build(),
            scheduler=scheduler,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def cached(pipe: Any) -> Any:
        helper = package.DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=2, cache_branch_id=0)
        helper.enable()
        return pipe

    random = torch.Generator().manual_seed(1)
    call = {
        "prompt_embeds": torch.randn(1, 5, 8, generator=random),
        "negative_prompt_embeds": torch.randn(1, 5, 8, generator=random),
        "latents": torch.randn(1, 4, 8, 8, generator=random),
        "height": 64,
        "width": 64,
        "num_inference_steps": 6,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "return_dict": False,
    }

    plain, weak = pipeline(), pipeline()
    weak.unet.mid_block.attentions[0] = zoo.KeepInTuple()
    weak.scheduler = plain.scheduler
    cached(plain), cached(weak)
    step, forward, last = plain.scheduler.step, plain.unet.forward, {}

    def noted(*args: Any, **kwargs: Any) -> Any:
        last["call"], last["out"] = (args, dict(kwargs)), forward(*args, **kwargs)
        return last["out"]

    @functools.wraps(step)
    def guided(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        w = weak.unet(*last["call"][0], **last["call"][1])[0].chunk(2)[1]
        return step(prediction + 1.5 * (last["out"][0].chunk(2)[1] - w), *args, **kwargs)

    plain.unet.forward, plain.scheduler.step = noted, guided
    with torch.no_grad():
        want = plain(**call)[0]
        pipe = cached(pipeline())
        unguided = pipe(**call)[0]
        with stg.apply(pipe, layers=["mid_block.attentions.0"], scale=1.5):
            got = pipe(**call)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, unguided, rtol=1e-3)
        with stg.apply(pipe, layers=["mid_block.attentions.0"], scale=1e-9):
            torch.testing.assert_close(pipe(**call)[0], unguided, rtol=0, atol=0)
        torch.testing.assert_close(pipe(**call)[0], unguided, rtol=0, atol=0)
