"""A weak pass is made with what the caller gave, whatever the cond pass has made of it; and with nothing of others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.passes.execution import EXECUTIONS
from tests import awkward, zoo
from tests.zoo import DIM, Block, DiT

LAYER, SCALE = 2, 1.5
close = {"rtol": 1e-4, "atol": 1e-4}


class PopsResiduals(DiT):
    """Takes what is added to its hidden states out of a list, as U-Nets with adapters do."""

    def forward(self, x: Tensor, text: Tensor, residuals: list[Tensor]) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, text) + (residuals.pop(0) if residuals else 0)
        return self.out(x)


class PopsOption(DiT):
    def forward(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        return super().forward(x * options.pop("factor", 1.0), text)


class TimedBlock(Block):
    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
        x = self.mix(x + time, text)
        return x  # noqa: RET504 - a name, to be read from the source


class ScalesTimestep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.out = nn.Linear(DIM, DIM), nn.Linear(1, DIM), nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(TimedBlock() for _ in range(4))

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        timestep *= 0.01
        time = self.time(timestep[:, None])[:, None]
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, text, time)
        return self.out(x)


class CentresInput(DiT):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).mul_(2), text)


def residuals(rows: int) -> list[Tensor]:
    return list(torch.randn(3, rows, 1, DIM, generator=torch.Generator().manual_seed(9)))


CASES: dict[str, tuple[type[nn.Module], Callable[[int], dict[str, Any]]]] = {
    "a list": (PopsResiduals, lambda rows: {"residuals": residuals(rows)}),
    "a dictionary": (PopsOption, lambda rows: {"options": {"factor": 0.3}}),
    "a timestep": (ScalesTimestep, lambda rows: {"timestep": torch.full((rows,), 800.0)}),
    "the latents": (CentresInput, lambda rows: {}),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name][0]().eval().requires_grad_(False)


def given(name: str, step: int = 0) -> dict[str, Any]:
    inputs = zoo.inputs(4, step)
    return {**inputs, **CASES[name][1](len(inputs["x"]))}


def without(model: nn.Module, layer: int) -> nn.Module:
    return zoo.without(model, [f"blocks.{layer}"], zoo.Keep)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("batched_cfg", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")
def test_arguments_that_the_model_changes(name: str, batched_cfg: bool, execution: str, mode: Any) -> None:
    model, weak = built(name), [without(built(name), layer) for layer in (LAYER, 0)]
    branches = [stg.Branch([LAYER], SCALE), stg.Branch([0], 0.5)]
    with mode():
        for one in (model, *weak):
            assert not torch.equal(one(**given(name)), without(one, 1)(**given(name)))
        with stg.apply(model, branches=branches, batched_cfg=batched_cfg, execution=execution):
            outputs = [model(**given(name, step)) for step in range(3)]
        for step, output in enumerate(outputs):
            plain = model(**given(name, step))
            term = sum(b.scale * (plain - one(**given(name, step))) for b, one in zip(branches, weak, strict=True))
            if batched_cfg:
                term = torch.cat([term[2:]] * 2)
            assert_close(output, plain + term, **close)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_guider_makes_all_its_passes_with_what_it_was_given(name: str) -> None:
    """Its own calls for cond and uncond share their lists and tensors, too."""
    model, weak = built(name), without(built(name), LAYER)
    guider = stg.Guider(model, [LAYER], SCALE, guidance_scale=3.0)
    for step in range(3):
        x, text, more = (lambda x, text, **more: (x, text, more))(**given(name, step))
        cond, uncond = model(**given(name, step)), model(**{**given(name, step), "text": -text})
        expected = uncond + 3.0 * (cond - uncond) + SCALE * (cond - weak(**given(name, step)))
        assert_close(guider(x, cond={"text": text}, uncond={"text": -text}, **more), expected, **close)


@torch.no_grad()
def test_a_u_net_with_the_residuals_of_an_adapter() -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, cross_attention_dim=8, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    x, text, maps = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 8), [torch.randn(2, 8, 16, 16)]
    maps.append(torch.randn(2, 16, 8, 8))

    def call(rows: slice = slice(None)) -> Tensor:
        return unet(
            x[rows], 500, text[rows], down_intrablock_additional_residuals=[m[rows] for m in maps], return_dict=False
        )[0]

    plain = call()
    with stg.skip(unet, [1], mode="attention"):
        weak = call(slice(1, None))
    with stg.apply(unet, [1], mode="attention", batched_cfg=True):
        outputs = [call() for _ in range(2)]
    for output in outputs:
        assert_close(output, plain + (plain[1:] - weak), **close)


def test_a_write_that_comes_late_is_an_error() -> None:
    class Late(DiT):
        calls = 0

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x.mul_(2) if self.calls == 4 else x, text)

    model = Late().eval().requires_grad_(False)
    with stg.apply(model, [2], execution="full"):
        for step in range(3):
            model(**zoo.inputs(4, step))
        with pytest.raises(stg.CallError, match=r"wrote into a tensor.*\(4, .*into a copy"):
            model(**zoo.inputs(4))


# --- nothing of others ------------------------------------------------------------------------------------------------

_OUTSIDE: list[Tensor] = []


class OutsideBlock(Block):
    """Leaves what it computes where no module holds it, and adds what the block before has left there."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.mix(x + (_OUTSIDE[0] if _OUTSIDE else 0), text)
        _OUTSIDE[:] = [x]
        return x


@pytest.fixture
def _outside() -> Iterator[None]:
    yield
    _OUTSIDE.clear()


@pytest.mark.usefixtures("_outside")
@pytest.mark.parametrize("execution", ["auto", "batched"])
@torch.no_grad()
def test_state_outside_of_the_model_without_cfg(execution: str) -> None:
    torch.manual_seed(0)
    model = DiT(OutsideBlock).eval()
    weak = without(model, LAYER)

    def run(one: nn.Module, step: int) -> Tensor:
        _OUTSIDE.clear()
        return one(**zoo.inputs(2, step))

    expected = [2 * run(model, step) - run(weak, step) for step in range(3)]
    model.register_forward_pre_hook(lambda *_: _OUTSIDE.clear())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with stg.apply(model, [LAYER], execution=execution):
            outputs = [model(**zoo.inputs(2, step)) for step in range(3)]
    assert_close(outputs, expected, **close)
    assert any("does not let the weak pass share" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("execution", ["auto", "sequential"])
@pytest.mark.parametrize("name", ["list", "memory", "in_place"])
@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")
@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_offloaded_weights_hide_nothing(name: str, execution: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    with torch.inference_mode() if name == "in_place" else torch.no_grad():
        model = awkward.build(name)
        with stg.apply(awkward.build(name), ["blocks.2"], execution="full") as handle:
            expected = [handle._session.models[0](**zoo.inputs(2, step)) for step in range(3)]
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with stg.apply(model, ["blocks.2"], execution=execution):
            assert_close([model(**zoo.inputs(2, step)) for step in range(3)], expected, **close)


@torch.no_grad()
def test_one_random_number_of_another_thread_does_not_end_sharing() -> None:
    model = zoo.build("plain")
    drawn: list[Tensor] = []

    def draw(*_: object) -> None:
        if not drawn:
            drawn.append(torch.randn(1))

    with warnings.catch_warnings():
        warnings.simplefilter("error", stg.StgWarning)
        with stg.apply(model, [3]) as handle, model.blocks[1].register_forward_pre_hook(draw):
            for step in range(4):
                before = handle.stats.blocks_run
                model(**zoo.inputs(2, step))
    assert handle.stats.blocks_run == before


@torch.no_grad()
def test_hooks_of_others_see_what_blocks_return() -> None:
    model, seen = zoo.build("plain"), []
    with stg.apply(model, [3]), model.blocks[0].register_forward_hook(lambda *call: seen.append(call[-1].norm())):
        for step in range(3):
            model(**zoo.inputs(2, step))
    assert all(type(norm) is Tensor for norm in seen)
    assert len({round(norm.item(), 4) for norm in seen}) == 3


@pytest.mark.parametrize("outer", ["sequential", "full"])
@torch.no_grad()
def test_batched_inside_of_another(outer: str) -> None:
    model = zoo.build("plain")
    weak = [without(model, layer) for layer in (2, 1)]
    with (
        stg.apply(model, [2], 1.0, execution=outer),
        warnings.catch_warnings(),
        stg.apply(model, [1], 0.5, execution="batched"),
    ):
        warnings.simplefilter("ignore", stg.StgWarning)
        outputs = [model(**zoo.inputs(2, step)) for step in range(3)]
    for step, output in enumerate(outputs):
        plain, one, two = (m(**zoo.inputs(2, step)) for m in (model, *weak))
        assert_close(output, plain + (plain - one) + 0.5 * (plain - two), **close)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = zoo.build("plain")

    def forward(self, timestep: Tensor, x: Tensor, text: Tensor) -> Tensor:
        return self.model(x * timestep, text)


@torch.no_grad()
def test_a_timestep_common_to_all_rows_may_come_first() -> None:
    model, time, (x, text) = TimeFirst(), torch.tensor([0.5]), zoo.inputs(4).values()
    plain, weak = model(time, x, text), without(model.model, 3)(x * time, text)
    with stg.apply(model, ["model.blocks.3"], batched_cfg=True) as handle:
        for _ in range(2):
            assert_close(model(time, x, text), plain + torch.cat([(plain - weak)[2:]] * 2), **close)
    assert handle.stats.blocks_run == 0


def test_nothing_of_a_run_outlives_the_with() -> None:
    model, kept = zoo.build("plain").requires_grad_(True), []
    handle = stg.apply(model, [2])
    with model.blocks[0].register_forward_hook(lambda *call: kept.append(StorageWeakRef(call[-1].untyped_storage()))):
        with handle:
            output = model(**zoo.inputs(2))
        assert output.requires_grad
        assert not kept[0].expired()
        del output
    assert kept[0].expired()
    assert handle.stats.guided_calls == 1
