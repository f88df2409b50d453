"""Guidance of models whose weights are somewhere else, or of another type, until they are needed."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import pipelines, zoo
from tests.installed import skip_if_older

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("diffusers.hooks")

SCALE, STEPS, CPU = 1.5, 3, torch.device("cpu")
LAYER = 1


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
        yield


def offloaded(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def offloaded_to_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def dispatched(model: nn.Module, folder: Path) -> None:
    places = {name: "disk" if name == "blocks" else "cpu" for name, _ in model.named_children()}
    places |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
    accelerate.dispatch_model(model, places, main_device=CPU, offload_dir=str(folder))


def offloaded_as_a_whole(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)


def in_groups(model: nn.Module, folder: Path) -> None:
    if not hasattr(torch, "accelerator") or not torch.accelerator.is_available():  # torch 2.5 has none
        skip_if_older("offloading blocks needs an accelerator")
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def in_groups_from_disk(model: nn.Module, folder: Path) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def cast(model: nn.Module, folder: Path) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


TOOLS = {
    tool.__name__: tool
    for tool in (offloaded, offloaded_to_disk, dispatched, offloaded_as_a_whole, in_groups, in_groups_from_disk, cast)
}
FAST = ("offloaded", "offloaded_as_a_whole", "in_groups", "cast")
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TOOLS]
STREAMED = ("offloaded", "offloaded_to_disk", "dispatched", "in_groups", "in_groups_from_disk")


def build() -> nn.Module:
    return zoo.FAMILIES["wan"].build()


def call(model: nn.Module, seed: int) -> Tensor:
    output: Tensor = model(**zoo.FAMILIES["wan"].inputs(2, seed))[0]
    return output


def textbook(tool: Callable[[nn.Module, Path], None], folder: Path) -> list[Tensor]:
    """Two models to which the same was done, one of them with a block that hands its input through."""
    cond, weak = build(), build()
    for name, model in (("cond", cond), ("weak", weak)):
        (folder / name).mkdir(parents=True)
        tool(model, folder / name)
    weak.blocks[LAYER] = zoo.KeepHiddenStates()
    results = []
    for seed in range(STEPS):
        c = call(cond, seed)
        results.append(c + SCALE * (c - call(weak, seed)))
    return results


def forwards(model: nn.Module) -> dict[str, Any]:
    """What the tools leave on modules."""
    names = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "__getstate__")
    return {
        f"{path}.{name}": module.__dict__[name]
        for path, module in model.named_modules()
        for name in names
        if name in module.__dict__
    }


@pytest.mark.parametrize(
    "execution", ["auto", *(pytest.param(e, marks=pytest.mark.slow) for e in ("sequential", "batched", "full"))]
)
@pytest.mark.parametrize("tool", EVERY)
@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
def test_the_textbook(tool: str, execution: str, tmp_path: Path) -> None:
    expected = textbook(TOOLS[tool], tmp_path)
    model = build()
    TOOLS[tool](model, tmp_path)
    before = forwards(model)
    with stg.apply(model, [LAYER], SCALE, execution=execution) as handle:
        for seed, wanted in enumerate(expected):
            assert_close(call(model, seed), wanted, rtol=1e-4, atol=1e-5)
    assert forwards(model) == before
    (used,) = handle._guides[0]._predictor._made.values()
    auto = "batched" if tool in STREAMED else "sequential"
    assert used.way == (auto if execution == "auto" else execution)


@pytest.mark.parametrize("tool", EVERY)
def test_set_up_after_apply_was_made(tool: str, tmp_path: Path) -> None:
    expected = textbook(TOOLS[tool], tmp_path)
    model = build()
    handle = stg.apply(model, [LAYER], SCALE)
    TOOLS[tool](model, tmp_path)
    before = forwards(model)
    with handle:
        for seed, wanted in enumerate(expected):
            assert_close(call(model, seed), wanted, rtol=1e-4, atol=1e-5)
    assert forwards(model) == before


@pytest.mark.parametrize("tool", EVERY)
def test_set_up_inside_the_with(tool: str, tmp_path: Path) -> None:
    """What somebody put on top of ours stays when ours is gone, and works."""
    expected = textbook(TOOLS[tool], tmp_path)
    model = build()
    with stg.apply(model, [LAYER], SCALE):
        call(model, 0)
        TOOLS[tool](model, tmp_path)
        for seed, wanted in enumerate(expected):
            assert_close(call(model, seed), wanted, rtol=1e-4, atol=1e-5)
    plain = build()
    TOOLS[tool](plain, tmp_path)
    assert_close(call(model, 0), call(plain, 0))


@pytest.mark.parametrize("all_of_it", [True, False])
def test_taken_off_inside_the_with(all_of_it: bool, tmp_path: Path) -> None:
    """Taking a hook off puts the `forward` back that it found, and ours is lost: an error, not another number."""
    model = build()
    plain = call(model, 0)
    offloaded(model, tmp_path)
    with stg.apply(model, [LAYER], SCALE, execution="sequential"):
        call(model, 0)
        accelerate.hooks.remove_hook_from_module(model if all_of_it else model.blocks[LAYER], recurse=all_of_it)
        with pytest.raises(stg.CallError, match=r"inside the `with`.*stg\.apply\(\)"):
            call(model, 0)
    if all_of_it:
        assert_close(call(model, 0), plain)


@pytest.mark.parametrize("tool", ["offloaded", "in_groups"])
def test_weights_are_brought_once(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a guided step; a second sweep over the weights would bring those of the later blocks again."""
    brought: Counter[str] = Counter()
    names: dict[int, str] = {}
    owner, method = {
        "offloaded": (accelerate.hooks.AlignDevicesHook, "pre_forward"),
        "in_groups": (hooks.group_offloading.ModuleGroup, "onload_"),
    }[tool]
    original = getattr(owner, method)

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        brought[names.get(id(args[0] if args else self.onload_leader), "elsewhere")] += 1
        return original(self, *args, **kwargs)

    def loads(execution: str) -> list[int]:
        model = build()
        TOOLS[tool](model, tmp_path)
        inner = "" if tool == "in_groups" else ".ffn.net.2"
        names.clear()  # of models that are gone, whose ids may come again
        names.update({id(model.get_submodule(f"blocks.{i}{inner}")): f"block {i}" for i in range(3)})
        with stg.apply(model, [LAYER], SCALE, execution=execution):
            call(model, 0)  # in the first call of a shape, ways are compared
            brought.clear()
            call(model, 1)
        return [brought[f"block {i}"] for i in range(3)]

    monkeypatch.setattr(owner, method, count)
    assert loads("auto") == [1, 1, 1]
    assert loads("sequential") == [1, 1, 2]
    assert loads("full") == [2, 1, 2]


def offload_of_models(pipe: Any) -> None:
    # The device cpu:0 is not the device cpu, so that its buffers are new in every call, as they are never on a GPU.
    warnings.filterwarnings("ignore", message=".*keeps something from one call to the next")
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.vae.enable_tiling()


@pytest.mark.slow
def test_model_offload_and_tiling_of_a_pipeline() -> None:
    """At the end of each run, the pipeline takes the hooks of its models off and sets up new ones."""
    plain, inputs, case = pipelines.build("wan")
    with stg.apply(plain, case.layers, case.scale):
        expected = pipelines.run(plain, inputs)
    pipe, *_ = pipelines.build("wan")
    offload_of_models(pipe)
    with stg.apply(pipe, case.layers, case.scale):
        for _ in range(3):
            assert torch.equal(pipelines.run(pipe, inputs), expected)
        assert zoo.is_plain(pipe.vae)
    assert pipe.vae.use_tiling
    assert torch.equal(pipelines.run(pipe, inputs), pipelines.run(plain, inputs))
    assert zoo.is_plain(pipe.transformer)
    for session in (stg.skip(pipe.transformer, case.layers), stg.apply(pipe, case.layers, on="uncond")):
        with session:
            pipelines.run(pipe, inputs)
            with pytest.raises(stg.CallError, match="Enter the `with` anew for each run"):
                pipelines.run(pipe, inputs)


def test_deep_copies_and_states_of_a_streamed_model_are_as_they_are(tmp_path: Path) -> None:
    model = build()
    state = copy.deepcopy(model.state_dict())
    offloaded(model, tmp_path)
    with stg.apply(model, [LAYER], SCALE):
        call(model, 0)
        inside = model.state_dict().keys()
    assert inside == state.keys()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_close(dict(model.state_dict()), dict(state))
