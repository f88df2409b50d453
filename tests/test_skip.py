"""What a skip computes: exactly the model without those blocks, in this thread, inside this `with`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from benchmarks import measure
from tests import awkward, zoo

exact: dict[str, Any] = {"rtol": 0, "atol": 0}
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")  # a skip that works says nothing


def differs(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3


# --- against blocks replaced by hand ----------------------------------------------------------------------------------

SKIPPABLE = [(name, layer) for name, case in zoo.ZOO.items() if case.numbered for layer in (0, -1, -2)]


@pytest.mark.parametrize(("name", "layer"), SKIPPABLE)
def test_zoo_skip_equals_model_with_identities(name: str, layer: int) -> None:
    model, inputs = zoo.build(name), zoo.inputs()
    plain = model(**inputs)
    expected = zoo.without(model, [zoo.ZOO[name].numbered[layer]])(**inputs)
    assert differs(expected, plain)
    with stg.skip(model, layers=[layer]):
        assert_close(model(**inputs), expected, **exact)
        assert_close(model(**inputs), expected, **exact)  # what was learnt from the first call holds in the second
    assert_close(model(**inputs), plain, **exact)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_zoo_skip_of_several_layers(name: str) -> None:
    case = zoo.ZOO[name]
    names = [*case.numbered[::2], *case.named[1:3]]
    names = names or (["first", "second"] if name == "no_stacks" else ["blocks.0", "blocks.2"])
    model, inputs = zoo.build(name), zoo.inputs()
    expected = zoo.without(model, names)(**inputs)
    with stg.skip(model, names):
        assert_close(model(**inputs), expected, **exact)


@pytest.mark.parametrize("name", ["in_place", "in_place_expression", "silent", "writes_through_view"])
def test_a_block_that_writes_into_its_arguments(name: str) -> None:
    model, inputs = awkward.build(name), zoo.inputs()
    plain, expected = model(**inputs), zoo.without(model, ["blocks.2"])(**inputs)
    with stg.skip(model, layers=[2]):
        for _ in range(2):  # in the first call, it may have to be found out what it returns
            assert_close(model(**inputs), expected, **exact)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)


def test_a_block_used_twice_is_bypassed_in_both_places() -> None:
    torch.manual_seed(0)
    model, inputs = zoo.Fractal().eval().requires_grad_(False), zoo.inputs()
    expected = zoo.without(model, ["blocks.1", "blocks.3"])(**inputs)
    for layers in ([1], [1, 3]):
        with stg.skip(model, layers):
            assert_close(model(**inputs), expected, **exact)


def test_shapes_may_change_between_calls() -> None:
    """What is remembered of a block is which argument stands in for its output, not its shape."""
    model = zoo.build("computed_text_image")
    oracle = zoo.without(model, ["blocks.1"])
    with stg.skip(model, [1]):
        for batch in (2, 5, 1):
            assert_close(model(**zoo.inputs(batch)), oracle(**zoo.inputs(batch)), **exact)


def test_gradients_flow_around_a_skipped_block() -> None:
    model = zoo.build("plain").requires_grad_(True)
    with stg.skip(model, [1]):
        model(**zoo.inputs()).sum().backward()
    assert model.blocks[1].ff.weight.grad is None
    assert model.blocks[0].ff.weight.grad is not None


# --- blocks that cannot be bypassed -----------------------------------------------------------------------------------


def test_a_block_that_hands_no_stream_through_is_refused() -> None:
    torch.manual_seed(0)
    model = zoo.DiT(zoo.ShrinkingBlock).eval()
    with (
        stg.skip(model, [1]),
        pytest.raises(
            stg.BlockError,
            match=r"ShrinkingBlock returns a tensor \(2, 2, 8\) that none of its inputs matches in shape and dtype "
            r"\(inputs: \(2, 3, 8\), \(2, 3, 8\)\)",
        ) as error,
    ):
        model(**zoo.inputs())
    assert isinstance(error.value, RuntimeError)


# --- cost (trap 15) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [[0], [3], [1, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", ["plain", "keyword_only", "nones"])
def test_skipped_blocks_are_not_computed(name: str, skipped: list[int]) -> None:
    model, inputs = zoo.build(name), zoo.inputs()
    fewer = zoo.without(model, [])
    fewer.blocks = nn.ModuleList(block for i, block in enumerate(fewer.blocks) if i not in skipped)
    full, expected = measure.flops(lambda: model(**inputs)), measure.flops(lambda: fewer(**inputs))
    assert expected < full
    with stg.skip(model, skipped):
        assert measure.flops(lambda: model(**inputs)) == expected


def test_a_block_that_has_to_be_learnt_is_computed_once() -> None:
    model, inputs = zoo.build("expression"), zoo.inputs()
    full, expected = (
        measure.flops(lambda: model(**inputs)),
        measure.flops(lambda: zoo.without(model, ["blocks.1"])(**inputs)),
    )
    skip = stg.skip(model, [1])
    with skip:
        assert measure.flops(lambda: model(**inputs)) == full
        assert measure.flops(lambda: model(**inputs)) == expected
    with skip:  # remembered by the object, not by the `with`
        assert measure.flops(lambda: model(**inputs)) == expected


# --- only here --------------------------------------------------------------------------------------------------------


def test_two_threads_skip_different_layers_at_the_same_time() -> None:
    """Both are inside block 0, hence inside the model, at the same time; so neither may set what the other reads."""
    model, inputs = zoo.build("plain"), zoo.inputs()
    expected = {layer: zoo.without(model, [f"blocks.{layer}"])(**inputs) for layer in (1, 2)}
    plain = model(**inputs)
    barrier = threading.Barrier(3, timeout=20)

    def meet(*_: Any) -> None:
        barrier.wait()

    handles = [model.blocks[i].register_forward_hook(meet) for i in (0, 3)]

    def run(layer: int | None) -> list[Tensor]:
        if layer is None:
            return [model(**inputs) for _ in range(5)]
        with stg.skip(model, [layer]):
            return [model(**inputs) for _ in range(5)]

    with ThreadPoolExecutor(3) as pool:
        results = {layer: pool.submit(run, layer) for layer in (1, 2, None)}
    for handle in handles:
        handle.remove()
    for layer in (1, 2):
        for result in results[layer].result():
            assert_close(result, expected[layer], **exact)
    for result in results[None].result():
        assert_close(result, plain, **exact)


@pytest.mark.parametrize("after", ["a call", "an exception", "an interrupt in a block", "an interrupt in a hook"])
def test_a_block_called_outside_the_model_is_plain(after: str) -> None:
    """PyTorch runs no hook after a KeyboardInterrupt; the bypass ends with the call all the same."""
    model, inputs = zoo.build("plain"), zoo.inputs()
    plain, whole = model.blocks[1](**inputs), model(**inputs)
    expected = zoo.without(model, ["blocks.1"])(**inputs)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with stg.skip(model, [1]):
        assert_close(model.blocks[1](**inputs), plain, **exact)
        if after == "a call":
            model(**inputs)
        elif after == "an exception":
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                model(inputs["x"][..., :3], inputs["text"])
        else:
            target = model.blocks[3] if after == "an interrupt in a block" else model
            with target.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
                model(**inputs)
        assert_close(model.blocks[1](**inputs), plain, **exact)
        if "interrupt" not in after:  # past `__call__`, hence past all hooks
            assert_close(model.forward(**inputs), whole, **exact)
        assert_close(model(**inputs), expected, **exact)


def test_another_model_that_shares_the_block_is_plain() -> None:
    one, other, inputs = zoo.build("plain"), zoo.build("plain", seed=5), zoo.inputs()
    other.blocks[1] = one.blocks[1]
    plain = other(**inputs)
    with stg.skip(one, [1]):
        one(**inputs)
        assert_close(other(**inputs), plain, **exact)


class Twice(nn.Module):
    """Calls its blocks after it has called itself, or something that calls it, `depth` times."""

    def __init__(self, through: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
        super().__init__()
        self.model = zoo.DiT()
        self.through = through

    def forward(self, x: Tensor, text: Tensor, depth: int = 2) -> Tensor:
        before = self.through(self)(x, text, depth=depth - 1) if depth else x
        return self.model(0.5 * (x + before), text)


@pytest.mark.parametrize("through", [lambda m: m, lambda m: m.forward], ids=["call", "forward"])
def test_a_model_that_calls_itself(through: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    torch.manual_seed(0)
    model, inputs = Twice(through).eval().requires_grad_(False), zoo.inputs()
    expected = zoo.without(model, ["model.blocks.1"])(**inputs)
    assert differs(expected, model(**inputs))
    with stg.skip(model, ["model.blocks.1"]):
        assert_close(model(**inputs), expected, **exact)
        assert_close(model(**inputs), expected, **exact)


def test_a_callable_mode_runs_once_in_a_model_that_calls_itself() -> None:
    model, inputs = Twice(lambda m: m).eval(), zoo.inputs()
    count = [0]

    def mode(call: stg.LayerCall) -> Tensor:
        count[0] += 1
        return call.compute()

    with stg.skip(model, ["model.blocks.1"], mode=mode):
        model(**inputs)
    assert count == [3]


# --- nesting ----------------------------------------------------------------------------------------------------------


def test_nested_skips_of_different_layers_add_up() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    outer, both = (zoo.without(model, names)(**inputs) for names in (["blocks.1"], ["blocks.1", "blocks.3"]))
    with stg.skip(model, [1]):
        with stg.skip(model, [3]):
            assert_close(model(**inputs), both, **exact)
        assert_close(model(**inputs), outer, **exact)


class Doubled(nn.Module):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return 2 * x


def test_of_nested_skips_of_one_layer_the_inner_one_counts() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    doubled, kept = zoo.without(model, ["blocks.1"], Doubled)(**inputs), zoo.without(model, ["blocks.1"])(**inputs)
    assert differs(doubled, kept)
    outer, inner = stg.skip(model, [1], mode=lambda call: 2 * call.args[0]), stg.skip(model, [1])
    for first, second, inside, outside in ((outer, inner, kept, doubled), (inner, outer, doubled, kept)):
        with first:
            with second:
                assert_close(model(**inputs), inside, **exact)
                with first:
                    assert_close(model(**inputs), outside, **exact)
                assert_close(model(**inputs), inside, **exact)
            assert_close(model(**inputs), outside, **exact)


def test_an_inner_skip_computes_the_layer_as_it_is() -> None:
    """And an outer skip whose every layer was overruled has nothing to complain about."""
    model, inputs = zoo.build("plain"), zoo.inputs()
    plain = model(**inputs)
    with stg.skip(model, [1]), stg.skip(model, [1], mode=lambda call: call.compute()):
        assert_close(model(**inputs), plain, **exact)


def test_a_guider_inside_a_skip_of_its_layer_has_its_own_mode() -> None:
    model, (x, text) = zoo.build("plain"), zoo.inputs().values()
    cond, weak = (zoo.without(model, ["blocks.1"], identity)(x, text) for identity in (None, Doubled))
    guider = stg.Guider(model, [1], 1.5, mode=lambda call: 2 * call.args[0])
    with stg.skip(model, [1]):
        assert_close(guider(x, text), cond + 1.5 * (cond - weak), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", ["full", "sequential"])
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("is_outer", [True, False])
def test_with_applied_guidance_the_skipped_model_is_guided(execution: str, layer: int, is_outer: bool) -> None:
    """Exactly, and with whatever the execution shares, whichever `with` comes first."""
    model, inputs = zoo.build("plain"), zoo.inputs()
    skipped = zoo.without(model, [f"blocks.{layer}"])
    cond, weak = skipped(**inputs), zoo.without(skipped, ["blocks.2"])(**inputs)
    applied, skip = stg.apply(model, [2], 1.0, execution=execution), stg.skip(model, [layer])
    first, second = (skip, applied) if is_outer else (applied, skip)
    with first, second:
        for _ in range(2):
            assert_close(model(**inputs), 2 * cond - weak, rtol=1e-5, atol=1e-5)
    assert applied.stats.blocks_run == (6 if execution == "full" else 2)


@pytest.mark.parametrize("layers", [(1, 2), (1, 1)])
def test_skips_may_end_in_any_order(layers: tuple[int, int]) -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    plain, second_only = model(**inputs), zoo.without(model, [f"blocks.{layers[1]}"])(**inputs)
    first, second = (stg.skip(model, [layer]) for layer in layers)
    first.__enter__()
    second.__enter__()
    model(**inputs)
    first.__exit__(None, None, None)
    assert_close(model(**inputs), second_only, **exact)
    second.__exit__(None, None, None)
    assert_close(model(**inputs), plain, **exact)


def test_skip_on_a_part_and_on_the_whole() -> None:
    """The skip counts in calls of the module it was given, wherever these come from."""
    model, inputs = zoo.build("wrapped"), zoo.inputs()
    expected = zoo.without(model, ["inner_model.blocks.1"])(**inputs)
    with stg.skip(model.inner_model, [1]):
        assert_close(model(**inputs), expected, **exact)
    plain = model.inner_model(**inputs)
    with stg.skip(model, [1]):
        assert_close(model.inner_model(**inputs), plain, **exact)
        model(**inputs)


def test_skipped_layers_are_told() -> None:
    model = zoo.build("plain")
    with stg.skip(model, ["blocks.2", 0]) as skip:
        model(**zoo.inputs())
    assert [(layer.index, layer.name) for layer in skip.layers] == [(0, "blocks.0"), (2, "blocks.2")]


# --- a callable as mode -----------------------------------------------------------------------------------------------


def test_callable_mode_sees_the_call_and_can_compute_it() -> None:
    model, inputs = zoo.build("keyword_only"), zoo.inputs()
    seen: list[stg.LayerCall] = []

    def half(call: stg.LayerCall) -> Tensor:
        seen.append(call)
        return 0.5 * (call.kwargs["hidden"] + call.compute())

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model.blocks[1]

        def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            return 0.5 * (hidden + self.block(hidden=hidden, **kwargs))

    expected = zoo.without(model, ["blocks.1"], Half)(**inputs)
    with stg.skip(model, [1], mode=half):
        assert_close(model(**inputs), expected, **exact)
    (call,) = seen
    assert call.layer is model.blocks[1]
    assert call.args == ()
    assert set(call.kwargs) == {"hidden", "text", "gain"}


def test_callable_mode_on_an_attention_module() -> None:
    """Trap 8: what takes the place of an attention must reach the output."""
    model, inputs = zoo.build("plain"), zoo.inputs()

    class OwnValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = model.blocks[2].attn

        def forward(self, x: Tensor) -> Tensor:
            return self.of.to_out(self.of.to_v(x))

    expected = zoo.without(model, ["blocks.2.attn"], OwnValues)(**inputs)
    assert differs(expected, model(**inputs))
    with stg.skip(model, ["blocks.2.attn"], mode=lambda call: call.layer.to_out(call.layer.to_v(call.args[0]))):
        assert_close(model(**inputs), expected, **exact)


def test_an_exception_in_a_callable_mode_is_passed_on() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    plain = model(**inputs)

    def broken(call: stg.LayerCall) -> Tensor:
        raise ZeroDivisionError("broken mode")

    with pytest.raises(ZeroDivisionError, match="broken mode"), stg.skip(model, [1], mode=broken):
        model(**inputs)
    assert_close(model(**inputs), plain, **exact)


# --- silence is reported ----------------------------------------------------------------------------------------------


class Sometimes(zoo.DiT):
    """Does not call all of its blocks."""

    def forward(self, x: Tensor, text: Tensor, blocks: int = 2) -> Tensor:
        for block in self.blocks[:blocks]:
            x = block(x, text)
        return x


def test_a_layer_that_is_never_called_is_reported_once() -> None:
    model, inputs = Sometimes().eval(), zoo.inputs()
    plain = model(**inputs)
    with (
        pytest.warns(
            stg.StgWarning, match=r"did not skip 'blocks\.2', 'blocks\.3': Sometimes ran .* calling them"
        ) as log,
        stg.skip(model, [1, 2, 3]),
    ):
        _ = [model(**inputs) for _ in range(2)]
    assert len(log) == 1
    assert log[0].filename == __file__
    with (
        pytest.warns(stg.StgWarning, match=r"did not skip 'blocks\.3': .* calling it in this thread"),
        stg.skip(model, 3),
    ):
        assert_close(model(**inputs), plain, **exact)


def test_a_layer_that_is_called_in_one_call_of_many_is_not_reported() -> None:
    model, inputs = Sometimes().eval(), zoo.inputs()
    with stg.skip(model, [3]) as skip:
        model(**inputs)
        model(**inputs, blocks=4)
        model(**inputs)
    with pytest.warns(stg.StgWarning, match="did not skip"), skip:  # every `with` counts for itself
        model(**inputs)


def test_a_model_that_is_never_called_is_reported() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    plain = model(**inputs)
    with (
        pytest.warns(stg.StgWarning, match=r"skipped nothing: DiT was not called inside this `with`"),
        stg.skip(model, 1),
    ):
        pass
    with pytest.warns(stg.StgWarning, match="skipped nothing"), stg.skip(model, 1):
        model.forward(**inputs)
    with pytest.warns(stg.StgWarning, match="skipped nothing"), stg.skip(model, 1), ThreadPoolExecutor(1) as pool:
        assert_close(pool.submit(lambda: model(**inputs)).result(), plain, **exact)


def test_an_error_explains_itself() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    with pytest.raises(ZeroDivisionError), stg.skip(model, [1]):
        raise ZeroDivisionError
    with stg.skip(model, [1]), pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(inputs["x"][..., :3], inputs["text"])


def test_leaving_without_entering_is_an_error() -> None:
    skip = stg.skip(zoo.build("plain"), [1])
    with pytest.raises(stg.CallError, match=r"left without having been entered\. Write: with stg\.skip\("):
        skip.__exit__(None, None, None)
    with skip:
        skip._model(**zoo.inputs())
    with pytest.raises(stg.CallError, match="left without"):
        skip.__exit__(None, None, None)


# --- checking without a skip -----------------------------------------------------------------------------------------


def test_check_returns_the_layers_and_touches_nothing() -> None:
    model = zoo.build("plain")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert [layer.name for layer in stg.check(model, [-1, 1], "attention")] == ["blocks.1", "blocks.3"]
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("layers", "mode", "error"),
    [([9], "residual", stg.LayerError), (["out"], "attention", stg.LayerError), ([1], "skip", stg.SettingError)],
)
def test_check_refuses_what_skip_refuses(layers: list[Any], mode: str, error: type[Exception]) -> None:
    with pytest.raises(error) as by_check:
        stg.check(zoo.build("plain"), layers, mode)
    with pytest.raises(error) as by_skip:
        stg.skip(zoo.build("plain"), layers, mode)
    assert str(by_check.value) == str(by_skip.value)
