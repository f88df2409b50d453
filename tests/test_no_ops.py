"""Guidance that does nothing is reported, a NaN is too; and looking for either never waits for a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stg_hooks as stg
from stg_hooks.guidance import watch
from tests import zoo

EXECUTIONS = ("sequential", "batched", "full")


def silence(block: nn.Module) -> nn.Module:
    """Make a block add nothing, as one that is gated by zero does."""
    for part in (block.attn.to_out, block.cross.to_out, block.ff):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    return block


class Half(nn.Module):
    """Has blocks that it does not call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.unused = model, zoo.build("plain")

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.model(x, text)


def use_apply(model: nn.Module, layers: Any, calls: int = 2, **settings: Any) -> None:
    with stg.apply(model, layers, **settings):
        for _ in range(calls):
            model(**zoo.inputs())


def use_guider(model: nn.Module, layers: Any, calls: int = 2, **settings: Any) -> None:
    guider = stg.Guider(model, layers, **settings)
    for _ in range(calls):
        guider(**zoo.inputs())


WAYS = pytest.mark.parametrize("use", [use_apply, use_guider])


# --- skips that do nothing --------------------------------------------------------------------------------------------


ADDS_NOTHING = r"bit for bit\. Most likely the block adds nothing .* Choose other la"
NOTHING: list[tuple[dict[str, Any], str]] = [({"execution": way}, ADDS_NOTHING) for way in EXECUTIONS]
NOTHING += [({"mode": mode}, f"mode='{mode}' changes adds nothing") for mode in ("attention", "values", "feed-forward")]


@pytest.mark.parametrize(("settings", "why"), NOTHING)
@WAYS
def test_a_skip_that_changes_nothing(
    use: Callable[..., None], settings: dict[str, Any], why: str, model: nn.Module
) -> None:
    silence(model.blocks[2])
    text = rf"skipping 'blocks\.2' changed nothing: .*{why}"
    with pytest.warns(stg.StgWarning, match=text) as log:
        use(model, [2], **settings)
    assert len(log) == 1
    assert log[0].filename == __file__
    with pytest.raises(stg.LayerError, match=text):
        use(model, [2], **settings, strict=True)


@WAYS
def test_a_layer_that_is_not_called(use: Callable[..., None], model: nn.Module) -> None:
    layers, text = ["unused.blocks.1", "model.blocks.2"], r"the denoiser did not call 'unused\.blocks\.1', so nothing"
    with pytest.warns(stg.StgWarning, match=text) as log:
        use(Half(model), layers)
    assert len(log) == 1
    with pytest.raises(stg.LayerError, match=text):
        use(Half(model), layers, strict=True)


def test_a_layer_that_the_uncond_prediction_does_not_call(model: nn.Module) -> None:
    half, text = Half(model), r"the denoiser did not call 'unused\.blocks\.1'"
    x, prompt = zoo.inputs(2).values()
    for strict, expected in ((False, pytest.warns(stg.StgWarning, match=text)), (True, pytest.raises(stg.LayerError))):
        with expected, stg.apply(half, ["unused.blocks.1"], on="uncond", batched_cfg=True, strict=strict):
            half(x, prompt)
    with pytest.raises(stg.LayerError, match=text):
        stg.Guider(half, ["unused.blocks.1"], on="uncond", guidance_scale=3.0, strict=True)(
            x, cond={"text": prompt}, uncond={"text": prompt}
        )


def test_one_branch_of_two(model: nn.Module) -> None:
    silence(model.blocks[2])
    with pytest.warns(stg.StgWarning) as log:
        use_apply(model, None, branches=[stg.Branch([1]), stg.Branch([2])])
    assert len(log) == 1
    assert "'blocks.2'" in str(log[0].message)
    assert "'blocks.1'" not in str(log[0].message)


class Lazy(nn.Module):
    """A block that answers with what it was given after its first call, as a cache may."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attn, self.inner, self.calls = block.attn, block, 0

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            x = self.inner(x, text)
        return x


def test_a_skip_that_changes_nothing_later_on(model: nn.Module) -> None:
    model.blocks[2] = Lazy(model.blocks[2])
    with pytest.warns(stg.StgWarning, match=r"changed nothing in 3 of 4 guided calls: .* or a cache answers"):
        use_apply(model, [2], 4, execution="full")
    model.blocks[2].calls = 0
    with pytest.raises(stg.LayerError, match="changed nothing in 1 of 2 guided calls"):
        use_apply(model, [2], 4, execution="full", strict=True)


@WAYS
def test_a_strict_run_without_complaints(use: Callable[..., None], model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model, [2], strict=True)
        use(model, [1, 3], mode="values", strict=True)


def test_strict_where_nothing_was_guided(model: nn.Module) -> None:
    with (
        pytest.raises(stg.CallError, match="guided nothing: the module made no call"),
        stg.apply(model, [2], strict=True),
    ):
        pass
    with pytest.raises(ZeroDivisionError), stg.apply(model, [2], strict=True):
        raise ZeroDivisionError  # which explains it, and is not replaced
    with stg.apply(model, [2], 0.0, strict=True):
        pass


def test_a_strict_skip(model: nn.Module) -> None:
    with pytest.raises(stg.CallError, match="skipped nothing: DiT was not called"), stg.skip(model, [2], strict=True):
        pass
    half = Half(model)
    with (
        pytest.raises(stg.CallError, match=r"did not skip 'unused\.blocks\.1'"),
        stg.skip(half, ["unused.blocks.1"], strict=True),
    ):
        half(**zoo.inputs())
    with stg.skip(model, [2], strict=True):
        model(**zoo.inputs())


def test_a_strict_error_restores_the_model(model: nn.Module) -> None:
    silence(model.blocks[2])
    before = zoo.snapshot(model)
    with pytest.raises(stg.LayerError):
        use_apply(model, [2], strict=True)
    assert zoo.snapshot(model) == before


def test_every_with_starts_afresh(model: nn.Module) -> None:
    silence(model.blocks[2])
    session = stg.apply(model, [2])
    for _ in range(2):
        with pytest.warns(stg.StgWarning, match="changed nothing"), session:
            model(**zoo.inputs())
    torch.nn.init.ones_(model.blocks[2].ff.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with session:
            model(**zoo.inputs())


# --- predictions that are not finite ----------------------------------------------------------------------------------


class Broken(nn.Module):
    """Predicts a NaN (or infinity) in one place, in calls from a given one on."""

    def __init__(self, model: nn.Module, first: int, value: float) -> None:
        super().__init__()
        self.model, self.left, self.value = model, first, value
        self.blocks = model.blocks

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        self.left -= 1
        out = self.model(x, text)
        if self.left < 0:
            out = out.clone()
            out[0, 0, 0] = self.value
        return out


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_is_passed_on_and_reported_once_with_the_step(value: float, model: nn.Module) -> None:
    broken = Broken(model, 1, value)  # it counts its caller's passes: those of ours take back what they count
    text = r"stg\.apply: the cond and weak prediction in step 6 of 10 \(counted from 0\) is not finite \(NaN or inf"
    outputs = []
    applied = stg.apply(broken, ["blocks.2"], execution="full")

    def run() -> None:
        for index in (5, 6, 7):
            applied.step = stg.Step(index, 10)
            outputs.append(broken(**zoo.inputs()).isfinite())

    with pytest.warns(stg.StgWarning, match=text) as log, applied:
        run()
    assert len(log) == 1
    assert [bool(finite.all()) for finite in outputs] == [True, False, False]
    assert all(finite[:, 1:].all() for finite in outputs)


def test_a_nan_of_the_weak_pass_only(model: nn.Module) -> None:
    guider = stg.Guider(model, [2], mode=lambda call: call.args[0] * torch.nan, execution="full")
    with pytest.warns(stg.StgWarning, match=r"stg\.Guider: the weak prediction in guided call 1 is not finite") as log:
        outputs = [guider(**zoo.inputs()) for _ in range(3)]
    assert all(output.isnan().all() for output in outputs)
    assert len(log) == 1
    assert log[0].filename == __file__


def test_a_nan_of_uncond_only(model: nn.Module) -> None:
    x, text = zoo.inputs(2).values()
    bad = torch.full_like(text, torch.nan)
    guider = stg.Guider(model, [2], guidance_scale=3.0)
    with pytest.warns(stg.StgWarning, match="the uncond prediction in guided call 1 is not finite"):
        guider(x, cond={"text": text}, uncond={"text": bad})
    with pytest.warns(stg.StgWarning, match="the uncond prediction in guided call 1 is not finite"):  # noqa: SIM117
        with stg.apply(model, [2], batched_cfg=True):
            model(torch.cat([x, x]), torch.cat([bad, text]))


# --- without waiting for a GPU ----------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that the CPU wants to know (`item`, `bool`, `equal`, a mask as index).

    States of random number generators (uint8) lie on the CPU anyway.
    """

    WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        # On the CPU, this one reads the memory without an operator.
        monkeypatch.setattr(Tensor, "tolist", lambda tensor: [self.found.append("tolist")])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = name.startswith("index") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or (name.startswith(self.WAITING) and args[0].dtype != torch.uint8):
            self.found.append(name)
        return func(*args, **kwargs or {})


class Pending:
    """An event of a GPU that is still busy."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_guided_call_reads_nothing_from_the_device(
    execution: str, rescale: float, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a model is known; the first calls of a run may look at it, a fixed number of times."""
    monkeypatch.setattr(watch, "_sent", lambda flags: (flags, Pending()))
    inputs = zoo.inputs(4)
    guider = stg.Guider(model, [2], 1.5, rescale=rescale, execution=execution)

    def count(call: Callable[[], object]) -> list[str]:
        for _ in range(3):
            call()
        with monkeypatch.context() as patch, Reads(patch) as reads:
            for _ in range(5):
                call()
        return reads.found

    with torch.no_grad():
        assert count(lambda: guider(**inputs)) == []
        with stg.apply(model, [2], 1.5, rescale=rescale, batched_cfg=True, guidance_scale=2.0, execution=execution):
            assert count(lambda: model(**inputs)) == []


def test_the_count_sees_every_way_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)
    ways: list[Callable[[], Any]] = [
        lambda: x[0].item(),
        lambda: bool(x[0] > 0),
        lambda: float(x.sum()),
        lambda: x.tolist(),
        lambda: torch.equal(x, x),
        lambda: x[x > 0],
        lambda: [1, 2][x[0].long()],
    ]
    for way in ways:
        with monkeypatch.context() as patch, Reads(patch) as reads:
            way()
        assert reads.found


def test_what_a_gpu_still_computes_is_read_at_the_end(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    silence(model.blocks[2])
    waited: list[int] = []

    class Late(Pending):
        def synchronize(self) -> None:
            waited.append(len(waited))

    monkeypatch.setattr(watch, "_sent", lambda flags: (flags, Late()))
    session = stg.apply(model, [2]).__enter__()
    for _ in range(3):
        model(**zoo.inputs())
    assert waited == []
    with pytest.warns(stg.StgWarning, match="changed nothing: "):
        session.__exit__(None, None, None)
    assert waited == [0, 1, 2]


def test_what_has_arrived_is_reported_in_a_later_call(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    silence(model.blocks[2])
    busy = [True]

    class Event(Pending):
        def query(self) -> bool:
            return not busy

    monkeypatch.setattr(watch, "_sent", lambda flags: (flags, Event()))
    guider = stg.Guider(model, [2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            guider(**zoo.inputs())
    busy.clear()
    with pytest.warns(stg.StgWarning, match="changed nothing"):
        guider(**zoo.inputs())


def test_a_strict_run_waits_in_its_first_call_only(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []

    class Late(Pending):
        def synchronize(self) -> None:
            waited.append(True)

    monkeypatch.setattr(watch, "_sent", lambda flags: (flags, Late()))
    guider = stg.Guider(model, [2], strict=True)
    for _ in range(4):
        guider(**zoo.inputs())
    assert len(waited) == 1


def test_flags_without_values_are_not_looked_at() -> None:
    """On the meta device, where shapes are tried out."""
    model = zoo.build("plain").to("meta")
    with stg.apply(model, [2], execution="full"):
        assert model(**{name: value.to("meta") for name, value in zoo.inputs().items()}).is_meta
