"""Guidance of compiled models: the textbook's result, no graph more from step to step, and no noise.

With a backend that only counts, Dynamo does all that could go wrong here, and nothing is generated.
"""

from __future__ import annotations

import copy
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.hooks.compiled import eagerly
from tests import pipelines, zoo

SCALE, STEPS = 1.5, 3
EXECUTIONS = ("auto", "sequential", "batched", "full")


@pytest.fixture(autouse=True)
def _quiet_and_fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch, by torch
        yield
    torch._dynamo.reset()


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:
        block.compile(**options)
    return model


def compile_blocks_from_outside(model: nn.Module, **options: Any) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, **options)
    return model


def compile_in_place(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


def compile_from_outside(model: nn.Module, **options: Any) -> nn.Module:
    compiled: nn.Module = torch.compile(model, **options)
    return compiled


WAYS = {
    "blocks": compile_blocks,
    "blocks from outside": compile_blocks_from_outside,
    "in place": compile_in_place,
    "from outside": compile_from_outside,
}
AS_A_WHOLE = ("in place", "from outside")
NEEDS_STANCE = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"),
    reason="torch 2.5 cannot be told to leave a call uncompiled: with fullgraph=True, our check of a weak pass fails",
)


def textbook(model: nn.Module, layers: list[str]) -> Callable[..., Tensor]:
    """What a guided call comes to, by a copy with other blocks in it."""
    model, weak = copy.deepcopy(model), zoo.without(model, layers)
    return lambda **inputs: (1 + SCALE) * model(**inputs) - SCALE * weak(**inputs)


def check_guided(
    how: str, execution: str, batched_cfg: bool = False, mode: Any = None, **options: Any
) -> tuple[list[int], stg.apply]:
    """Guide a compiled model twice, with plain calls before; return the number of graphs after each call."""
    plain = zoo.build("plain")
    expected, counter = textbook(plain, ["blocks.2"]), CompileCounter()
    compiled = WAYS[how](copy.deepcopy(plain), backend=counter, **options)
    counts = []
    for _ in range(2):
        assert_close(compiled(**zoo.inputs(4)), plain(**zoo.inputs(4)))
        counts.append(counter.frame_count)
        with stg.apply(compiled, [2], SCALE, execution=execution, batched_cfg=batched_cfg) as handle:
            for seed in range(STEPS):
                inputs = zoo.inputs(4, seed)
                got = compiled(**inputs)
                if batched_cfg:
                    cond = {name: value[2:] for name, value in inputs.items()}
                    term = expected(**cond) - plain(**cond)
                    assert_close(got, plain(**inputs) + torch.cat([term, term]))
                else:
                    assert_close(got, expected(**inputs))
                counts.append(counter.frame_count)
    return counts, handle


def way_of(handle: stg.apply) -> str:
    (execution,) = handle._guides[0]._predictor._made.values()
    return str(execution.way)


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("execution", [pytest.param("auto", marks=pytest.mark.slow), *EXECUTIONS[1:]])
@pytest.mark.parametrize("how", ["blocks", pytest.param("blocks from outside", marks=pytest.mark.slow)])
def test_compiled_blocks(how: str, execution: str, fullgraph: bool) -> None:
    counts, handle = check_guided(how, execution, fullgraph=fullgraph)
    assert way_of(handle) == ("sequential" if execution == "auto" else execution)
    assert counts[0] > 0
    assert len(set(counts[1:])) == 1, counts  # what the first guided call needs is all there ever is
    assert handle.stats.blocks_run == STEPS * (3 if execution == "full" else 1)


@pytest.mark.parametrize("how", ["blocks", *(pytest.param(how, marks=pytest.mark.slow) for how in AS_A_WHOLE)])
@pytest.mark.parametrize("dynamic", [True, *(pytest.param(d, marks=pytest.mark.slow) for d in (False, None))])
def test_shapes_are_dynamic_or_not(how: str, dynamic: bool | None) -> None:
    """With [uncond, cond] rows, a weak pass has half as many as the call."""
    counts, _ = check_guided(how, "auto", batched_cfg=True, dynamic=dynamic, fullgraph=True)
    assert len(set(counts[2:])) == 1, counts


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("how", AS_A_WHOLE)
def test_compiled_as_a_whole(how: str, fullgraph: bool) -> None:
    for execution in ("auto", "full"):
        counts, handle = check_guided(how, execution, fullgraph=fullgraph)
        assert way_of(handle) == "full"
        assert len(set(counts[1:])) == 1, counts
        assert counts[-1] == 3  # plain, the cond pass of a guided call, its weak pass


@NEEDS_STANCE
@pytest.mark.parametrize("how", [AS_A_WHOLE[0], pytest.param(AS_A_WHOLE[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("execution", ["sequential", pytest.param("batched", marks=pytest.mark.slow)])
def test_a_way_that_a_compiled_whole_does_not_allow_is_told_once(how: str, execution: str) -> None:
    with pytest.warns(stg.StgWarning, match="compiled as a whole") as caught:
        _, handle = check_guided(how, execution, fullgraph=True)
    assert len(caught) == 2  # one for each stg.apply()
    text = str(caught[0].message)
    assert f"execution={execution!r}" in text
    assert "Going on with execution='full'" in text
    assert "block.compile()" in text
    assert way_of(handle) == "full"


@pytest.mark.parametrize(
    ("how", "execution", "way"),
    [
        ("blocks", "sequential", "sequential"),
        *(pytest.param("blocks", e, e, marks=pytest.mark.slow) for e in ("batched", "full")),
        pytest.param("in place", "auto", "full", marks=pytest.mark.slow),
    ],
)
def test_compiled_after_apply_was_made(how: str, execution: str, way: str) -> None:
    model = zoo.build("plain")
    expected, counter = textbook(model, ["blocks.2"]), CompileCounter()
    handle = stg.apply(model, [2], SCALE, execution=execution)
    WAYS[how](model, backend=counter, fullgraph=True)
    with handle:
        for seed in range(STEPS):
            assert_close(model(**zoo.inputs(2, seed)), expected(**zoo.inputs(2, seed)))
    assert counter.frame_count == 2 if how == "in place" else counter.frame_count > 0
    assert way_of(handle) == way


@NEEDS_STANCE
@pytest.mark.parametrize("execution", ["sequential", pytest.param("batched", marks=pytest.mark.slow)])
def test_blocks_compiled_inside_the_with(execution: str) -> None:
    model = zoo.build("plain")
    expected = textbook(model, ["blocks.2"])
    with stg.apply(model, [2], SCALE, execution=execution) as handle:
        assert_close(model(**zoo.inputs(2)), expected(**zoo.inputs(2)))
        compile_blocks(model, backend="eager", fullgraph=True)
        with pytest.warns(stg.StgWarning, match="compiled inside the `with`"):
            assert_close(model(**zoo.inputs(2, 1)), expected(**zoo.inputs(2, 1)))
        assert_close(model(**zoo.inputs(2, 2)), expected(**zoo.inputs(2, 2)))
    assert way_of(handle) == "full"


@pytest.mark.slow
def test_called_from_what_was_compiled_afterwards() -> None:
    """The guided model is called from inside compiled code: that code is left there, or the error says what to do."""
    model = zoo.build("plain")
    expected = textbook(model, ["blocks.2"])
    with stg.apply(model, [2], SCALE):
        compiled = torch.compile(model, backend="eager")
        model(**zoo.inputs(2))  # imports what compiles
    with stg.apply(model, [2], SCALE):
        for seed in range(2):
            assert_close(compiled(**zoo.inputs(2, seed)), expected(**zoo.inputs(2, seed)))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile it before stg\.apply\(\), and pass what is"):
            torch.compile(model, backend="eager", fullgraph=True)(**zoo.inputs(2))


@pytest.mark.slow
def test_a_compiled_module_inside_a_wrapper() -> None:
    model = zoo.build("wrapped")
    expected, counter = textbook(model, ["inner_model.blocks.2"]), CompileCounter()
    model.inner_model.compile(backend=counter, fullgraph=True)
    with stg.apply(model, [2], SCALE) as handle:
        for seed in range(2):
            assert_close(model(**zoo.inputs(2, seed)), expected(**zoo.inputs(2, seed)))
    assert way_of(handle) == "full"
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["function", "module"])
def test_guider(compiled: str) -> None:
    """A loop of one's own, around a compiled module or a compiled function that calls the module."""
    model, counter = zoo.build("plain"), CompileCounter()
    expected = textbook(model, ["blocks.2"])
    if compiled == "module":
        guider = stg.Guider(compile_in_place(model, backend=counter, fullgraph=True), [2], SCALE)
    else:
        function = torch.compile(lambda x, text: model(x, text), backend=counter, fullgraph=True)
        guider = stg.Guider(function, [2], SCALE, model=model)
    counts = []
    for seed in range(STEPS):
        assert_close(guider(**zoo.inputs(2, seed)), expected(**zoo.inputs(2, seed)))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


@pytest.mark.parametrize("how", ["blocks", pytest.param("in place", marks=pytest.mark.slow)])
def test_the_weak_model_makes_the_uncond_prediction(how: str) -> None:
    model, counter = zoo.build("plain"), CompileCounter()
    plain, weak = copy.deepcopy(model), zoo.without(model, ["blocks.2"])
    compiled = WAYS[how](model, backend=counter, fullgraph=True)
    counts = []
    with stg.apply(compiled, [2], on="uncond", batched_cfg=True):
        for seed in range(STEPS):
            inputs = zoo.inputs(4, seed)
            expected = torch.cat([weak(**inputs)[:2], plain(**inputs)[2:]])
            assert_close(compiled(**inputs), expected)
            counts.append(counter.frame_count)
    # A model that is compiled as a whole meets the plain half in the second call: the first one compares in eager mode.
    assert len(set(counts[1:])) == 1, counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "mode"), [*zip(WAYS, ["smoothed", "feed-forward", "attention", "values"], strict=True)]
)
def test_modes_equal_those_of_the_plain_model(how: str, mode: str) -> None:
    family = zoo.FAMILIES["wan"]
    model = family.build()
    inputs = [family.inputs(2, seed) for seed in range(2)]

    def run(model: nn.Module) -> Tensor:
        with stg.apply(model, [1], SCALE, mode=mode):
            return torch.stack([model(**arguments)[0] for arguments in inputs])

    expected = run(model)
    warnings.simplefilter("default")  # Dynamo says where it leaves the graph, which these modes need
    assert_close(run(WAYS[how](model, backend="eager")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_repeated_blocks_of_a_stock_pipeline(family: str) -> None:
    pipe, call, case = pipelines.build(family)

    def run() -> Tensor:
        with pipelines.scheduler_inputs(pipe) as received:
            with stg.apply(pipe, layers=case.layers, scale=case.scale):
                pipelines.run(pipe, call, num_inference_steps=2)
            return torch.stack(received)

    expected, counter = run(), CompileCounter()
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert_close(run(), expected, rtol=1e-4, atol=1e-4)
    graphs = counter.frame_count
    assert graphs > 0
    run()
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_a_compiled_denoiser_in_a_stock_pipeline() -> None:
    pipe, call, case = pipelines.build("wan")

    def run(steps: int) -> Tensor:
        with pipelines.scheduler_inputs(pipe) as received:
            with stg.apply(pipe, layers=case.layers, scale=case.scale):
                pipelines.run(pipe, call, num_inference_steps=steps)
            return torch.stack(received)

    expected, counter = run(3), CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    warnings.simplefilter("default")
    assert_close(run(3), expected, rtol=1e-4, atol=1e-4)
    graphs = counter.frame_count
    assert graphs > 0
    run(3)
    assert counter.frame_count == graphs


@NEEDS_STANCE
def test_calls_that_are_not_compiled_in_several_threads() -> None:
    """The check that rows are cut right runs eagerly; whichever thread ends first, compiling goes on afterwards."""
    stance = torch._dynamo.eval_frame._stance
    first, second = eagerly(), eagerly()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance is stance


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="generated code needs a C++ compiler")
def test_generated_code() -> None:
    warnings.simplefilter("default")
    for how in ("blocks", "in place"):
        check_guided(how, "auto", fullgraph=True)


# --- a skip -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["blocks", *(pytest.param(how, marks=pytest.mark.slow) for how in AS_A_WHOLE)])
def test_a_skip_and_a_guider_of_a_compiled_model(how: str, fullgraph: bool) -> None:
    warnings.simplefilter("default")
    model, inputs = zoo.build("plain"), zoo.inputs()
    plain, weak = model(**inputs), zoo.without(model, ["blocks.1"])(**inputs)
    called = WAYS[how](model, backend="eager", fullgraph=fullgraph)
    assert_close(called(**inputs), plain)
    before = zoo.snapshot(model)
    for _ in range(2):
        with stg.skip(called, ["blocks.1"]):
            for _ in range(2):
                assert_close(called(**inputs), weak)
        assert zoo.snapshot(model) == before
        assert_close(called(**inputs), plain)
    guider = stg.Guider(called, ["blocks.1"], 1.0, execution="full")
    assert_close(guider(**inputs), 2 * plain - weak)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_skip_that_was_built_before_the_model_was_compiled_from_outside() -> None:
    """The skip is on the model itself, which is now called from inside what was compiled."""
    warnings.simplefilter("default")
    model, inputs = zoo.build("plain"), zoo.inputs()
    plain, weak = model(**inputs), zoo.without(model, ["blocks.1"])(**inputs)
    skip = stg.skip(model, [1])
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with skip:
            assert_close(compiled(**inputs), weak)
        assert_close(compiled(**inputs), plain)


def test_a_mode_that_cannot_be_compiled() -> None:
    model, inputs = compile_in_place(zoo.build("plain"), backend="eager", fullgraph=True), zoo.inputs()
    local = threading.Lock()

    def mode(call: stg.LayerCall) -> Tensor:
        with local:
            return call.args[0]

    with (
        stg.skip(model, [1], mode=mode),
        pytest.raises(stg.CallError, match=r"cannot trace DiT with layers skipped\. .* compile its blocks"),
    ):
        model(**inputs)
    compile_blocks(model := zoo.build("plain"), backend="eager", fullgraph=True)
    expected = zoo.without(model, ["blocks.1"])(**inputs)
    with stg.skip(model, [1], mode=mode):  # what the message says works
        assert_close(model(**inputs), expected)
