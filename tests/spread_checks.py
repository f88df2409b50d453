"""What the ranks of test_parallel_diffusers.py do: models that are spread over devices, and stock pipelines."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

import stg_hooks as stg
from tests import pipelines, ranks, zoo
from tests.tiny_models import MODELS

Settings = tuple[int, str, str]
"""A layer, a mode and an execution."""
BYPASS: list[Settings] = [(3, "residual", way) for way in ("auto", "full", "sequential", "batched")]


def wan() -> tuple[nn.Module, dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(2, 16, 3, 4, 4, generator=random),
        "encoder_hidden_states": torch.randn(2, 16, 32, generator=random),
        "timestep": torch.full((2,), 500.0),
        "return_dict": False,
    }
    return pipelines.build_transformer(pipelines.load_case("wan")).requires_grad_(False), call


def flux() -> tuple[nn.Module, dict[str, Any]]:
    tiny = MODELS["FluxTransformer2DModel"]
    call = tiny.inputs(2)
    for name, tokens in (("hidden_states", 8), ("encoder_hidden_states", 4), ("img_ids", 8), ("txt_ids", 4)):
        shape = list(call[name].shape)
        shape[-2] = tokens  # context parallelism asks for even numbers
        call[name] = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    return tiny.build("FluxTransformer2DModel"), call


def pretend_that_the_cpu_is_an_accelerator(patch: pytest.MonkeyPatch) -> None:
    """Diffusers asks for the accelerator before it spreads a model; nothing else in what follows needs one."""
    import diffusers.hooks.tensor_parallel as tensor_parallel

    patch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cpu"))
    patch.setattr(torch.accelerator, "device_count", lambda: 1)
    patch.setattr(tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",))


def guided(model: nn.Module, call: dict[str, Any], layer: int, mode: str, execution: str) -> Tensor:
    """The second of two guided calls: executions learn from the first one."""
    torch.manual_seed(0)  # for the mode that shuffles
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", stg.StgWarning)
        with stg.apply(model, [layer], 1.5, mode=mode, execution=execution, batched_cfg=True):
            model(**call)
            torch.manual_seed(1)
            found: Tensor = model(**call)[0]
    return found


def same_as_alone(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]],
    spread: Callable[[nn.Module], nn.Module],
    settings: list[Settings],
) -> None:
    """Compare guided calls of a model that is spread over all ranks with those of a whole one."""
    whole, call = make()
    model = spread(make()[0])
    for layer, mode, execution in settings:
        expected = guided(whole, call, layer, mode, "full")
        assert (expected - whole(**call)[0]).abs().max() > 0.02 * expected.std()
        found = guided(model, call, layer, mode, execution)
        assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, s=(layer, mode, execution): f"{s}: {m}")
        ranks.same_on_all(found, dist.group.WORLD)
        with torch.no_grad():
            assert_close(model(**call), whole(**call), rtol=1e-4, atol=1e-4)


def check_ddp(rank: int, size: int) -> None:
    def spread(model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model.requires_grad_(True))

    same_as_alone(wan, spread, [*BYPASS, *((2, mode, "auto") for mode in zoo.OTHER_MODES)])


def check_fsdp2(rank: int, size: int) -> None:
    def spread(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    modes: list[Settings] = [(2, mode, "auto") for mode in zoo.OTHER_MODES]
    with pytest.raises(stg.SettingError, match="itself spread over ranks"):
        stg.apply(spread(wan()[0]), [2], group=dist.group.WORLD)
    same_as_alone(wan, spread, [*BYPASS, (0, "residual", "auto"), (5, "residual", "sequential"), *modes])


def check_tensor_parallel(rank: int, size: int) -> None:
    from diffusers.models._modeling_parallel import TensorParallelConfig

    def spread(model: nn.Module) -> nn.Module:
        with pytest.MonkeyPatch.context() as patch:
            pretend_that_the_cpu_is_an_accelerator(patch)
            model.enable_parallelism(config=TensorParallelConfig(tp_degree=size))
        return model

    with pytest.raises(stg.SettingError, match="itself spread over ranks"):
        stg.apply(spread(flux()[0]), [2], group=dist.group.WORLD)

    ways: list[Settings] = [(1, "residual", way) for way in ("auto", "full", "sequential", "batched")]
    modes: list[Settings] = [(2, mode, "auto") for mode in zoo.OTHER_MODES if mode != "attention-input"]
    same_as_alone(flux, spread, [*ways, *modes, (0, "feed-forward", "auto"), (0, "shuffled", "auto")])
    model, call = flux()
    spread(model)
    for mode in ("attention", "values", "smoothed"):  # queries of image and text are put together out of sight
        with pytest.raises(stg.BlockError, match="cannot be followed"):
            guided(model, call, 0, mode, "auto")


def check_context_parallel(rank: int, size: int) -> None:
    from diffusers import ContextParallelConfig

    def spread(model: nn.Module) -> nn.Module:
        with pytest.MonkeyPatch.context() as patch:
            pretend_that_the_cpu_is_an_accelerator(patch)
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
        return model

    same_as_alone(wan, spread, [*BYPASS, (5, "residual", "auto"), (2, "values", "auto"), (2, "feed-forward", "auto")])
    model = spread(wan()[0])
    with pytest.raises(stg.LayerError, match=r"'blocks\.0'.*context parallelism splits the tokens"):
        stg.apply(model, [0])
    with pytest.raises(stg.LayerError, match="mode='shuffled' mixes all tokens"):
        stg.apply(model, [2], mode="shuffled")
    with pytest.raises(stg.SettingError, match="itself spread over ranks"):
        stg.apply(model, [2], group=dist.group.WORLD)
    same_as_alone(flux, spread, [(1, "residual", "auto")])
    model, call = flux()
    spread(model)
    for layer, mode in ((0, "attention"), (2, "attention"), (2, "smoothed")):  # which tokens are text is not known
        with pytest.raises(stg.BlockError, match="cannot be followed"):
            guided(model, call, layer, mode, "auto")


def check_branches_of_pipelines(rank: int, size: int) -> None:
    """Branch parallelism around stock pipelines: one call for both rows, a call each, no CFG, two denoisers."""
    for family in ("ltx", "mochi", "wan", "hunyuan_video"):
        pipe, call, case = pipelines.build(family)
        pipe.transformer.requires_grad_(False)
        g = case.info["call"].get("guidance_scale", 1.0) if family != "hunyuan_video" else 1.0
        for rescale in (0.0, 0.7):
            with pipelines.textbook(copy.copy(pipe), case, [([2], 1.0)], g, rescale):
                expected = pipelines.run(pipe, call)
            with torch.no_grad(), stg.apply(pipe, [2], 1.0, rescale=rescale, group=dist.group.WORLD, timeout=60):
                found = pipelines.run(pipe, call)
            assert_close(found, expected, rtol=0, atol=1e-4 * expected.std().item())
            ranks.same_on_all(found, dist.group.WORLD)


CHECKS: dict[str, ranks.Check] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
