"""The ways to compute a weak prediction give the same one, also where a model makes it hard to share work."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests import awkward, zoo

SHARING = ("sequential", "batched")
STEPS = 3


pytestmark = pytest.mark.usefixtures("inference")


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """Agree to 1e-5 of the standard deviation."""
    atol = tolerance * float(expected.std())
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda message: f"{what}: {message}")


def damped(call: stg.skip) -> Any:
    """A mode for blocks of any form: computes the block, and gives back half of it."""
    halve: Callable[[Any], Any] = lambda leaf: 0.5 * leaf if isinstance(leaf, Tensor) else leaf  # noqa: E731
    return torch.utils._pytree.tree_map(halve, call.compute())


def guided(
    model: nn.Module, layers: Any, execution: str, batched_cfg: bool = False, steps: int = STEPS, **settings: Any
) -> tuple[Tensor, stg.apply]:
    """Make some guided calls, each with other values."""
    torch.manual_seed(0)
    with stg.apply(model, layers, 1.5, batched_cfg=batched_cfg, execution=execution, **settings) as handle:
        outputs = [model(**zoo.inputs(4, seed)) for seed in range(steps)]
    return torch.stack(outputs), handle


# --- the same predictions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched_cfg", [False, True])
@pytest.mark.parametrize("name", [name for name, case in zoo.ZOO.items() if case.numbered])
@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")  # some have no rows that can be told apart
def test_every_layer_of_the_zoo(name: str, batched_cfg: bool) -> None:
    for layer in range(len(zoo.ZOO[name].numbered)):
        expected, _ = guided(zoo.build(name), [layer], "full", batched_cfg, steps=2)
        for execution in SHARING:
            got, _ = guided(zoo.build(name), [layer], execution, batched_cfg, steps=2)
            assert_same(got, expected, what=f"{layer}, {execution}")


BRANCHES = {
    "two places": [stg.Branch([1], 1.0), stg.Branch([3], 0.5)],
    "the later one first": [stg.Branch([3], 1.0), stg.Branch([0], 0.5), stg.Branch([2, 3], -0.5)],
    "the same place": [stg.Branch([2], 1.0), stg.Branch([2], 0.5, damped)],
}


@pytest.mark.parametrize("execution", SHARING)
@pytest.mark.parametrize("batched_cfg", [False, True])
@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_branches_start_from_their_own_layers(branches: list[stg.Branch], batched_cfg: bool, execution: str) -> None:
    expected, _ = guided_by(branches, zoo.build("plain"), "full", batched_cfg)
    got, handle = guided_by(branches, zoo.build("plain"), execution, batched_cfg)
    assert_same(got, expected)
    run = [4 - min(branch.layers) - (1 if branch.mode == "residual" else 0) for branch in branches]
    skipped = [len(branch.layers) - 1 for branch in branches]
    assert handle.stats.blocks_run == STEPS * (sum(run) - sum(skipped))


def guided_by(
    branches: list[stg.Branch], model: nn.Module, execution: str, batched_cfg: bool
) -> tuple[Tensor, stg.apply]:
    with stg.apply(model, branches=branches, batched_cfg=batched_cfg, execution=execution) as handle:
        return torch.stack([model(**zoo.inputs(4, seed)) for seed in range(STEPS)]), handle


@pytest.mark.parametrize("execution", SHARING)
def test_a_layer_inside_a_block(execution: str) -> None:
    """A mode that acts inside a block: the prefix ends before that block."""

    def run(way: str) -> tuple[Tensor, stg.apply]:
        return guided(zoo.build("plain"), ["blocks.2.attn"], way, True, mode=damped)

    expected, _ = run("full")
    got, handle = run(execution)
    assert_same(got, expected)
    assert handle.stats.blocks_saved == 2 * STEPS


# --- the call's own rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "image_text", "unet", "two_stacks"])
def test_own_rows_are_bit_identical_in_sequential_execution(name: str) -> None:
    model, inputs, seen = zoo.build(name), zoo.inputs(4), []
    plain = model(**inputs)
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    with handle, stg.apply(model, [2], 1.5, batched_cfg=True, execution="sequential"):
        model(**inputs)
        model(**inputs)
    first, second = seen[:3], seen[3:]
    for calls in (first, second):
        assert torch.equal(calls[0], plain)
        assert not torch.equal(calls[1], plain[2:])
    torch.testing.assert_close(first[2], plain[2:])  # once, the pass is made without the skip, and compared
    assert len(second) == 2


# --- models that make it hard -----------------------------------------------------------------------------------------


def layers_of(name: str) -> list[list[int]]:
    return [[3]] if name == "aliasing_views" else [[1], [2, 3]]  # its layer 1 cannot be bypassed


@pytest.mark.parametrize("mode", ["residual", damped])
@pytest.mark.parametrize("batched_cfg", [False, True])
@pytest.mark.parametrize("name", [*awkward.MODELS, *awkward.CHANGING])
@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")
def test_never_another_number(name: str, batched_cfg: bool, mode: Any) -> None:
    for layers in layers_of(name):
        expected, _ = guided(awkward.build(name), layers, "full", batched_cfg, mode=mode)
        for execution, inference in itertools.product(SHARING, (torch.no_grad, torch.inference_mode)):
            with inference():
                got, _ = guided(awkward.build(name), layers, execution, batched_cfg, mode=mode)
                assert_same(got, expected, what=f"{layers}, {execution}, {inference.__name__}")


REASONS = {
    "list": "ListBlock writes into its arguments",
    "hides_errors": "calls other blocks in the weak pass",
    "memory": "keeps something from one call to the next",
    "counting": "keeps something from one call to the next",
    "buffer": "keeps something from one call to the next",
    "noisy": "draws random numbers",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_model_that_cannot_share_is_told_once(name: str) -> None:
    with pytest.warns(stg.StgWarning, match=REASONS[name]) as caught:
        _, handle = guided(awkward.build(name), [3], "sequential", batched_cfg=True)
    told = [str(warning.message) for warning in caught if "share work" in str(warning.message)]
    assert len(told) == 1
    assert "execution='full'" in told[0]
    assert handle.stats.blocks_run == 3 * STEPS


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("silent_on_own", 0),
        ("in_place", 0),
        ("in_place_expression", 0),
        ("writes_through_view", 0),
        ("parent_writes", 0),
        ("later_writes", 0),
        ("long_skips", 1),
        ("latent_diffusion", 0),
        ("twice", 0),
        ("caching", 1),
        ("derived", 1),
        ("derived_mask", 1),
        ("derived_choice", 1),
        ("derived_number", 1),
        ("swallowing", 1),
    ],
)
@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
def test_a_model_that_can_share_does(name: str, late: int) -> None:
    """Some are found out in the first call, which is then computed in full."""
    _, handle = guided(awkward.build(name), [3], "sequential", batched_cfg=True)
    assert handle.stats.blocks_run == 3 * late


def test_what_blocks_set_in_dictionaries_is_that_of_each_call() -> None:
    _, handle = guided(awkward.build("latent_diffusion_values"), [3], "sequential", batched_cfg=False)
    assert handle.stats.blocks_run == 0


def test_rows_that_cannot_be_told_apart_are_not_shared() -> None:
    _, handle = guided(awkward.build("sequence_first"), [3], "sequential", batched_cfg=True)
    assert handle.stats.blocks_run == 3 * STEPS
    _, handle = guided(awkward.build("sequence_first"), [3], "sequential", batched_cfg=False)
    assert handle.stats.blocks_run == 0


def test_batched_falls_back_once_and_says_so() -> None:
    expected, _ = guided(awkward.build("sequence_first"), [3], "full", batched_cfg=False)
    with pytest.warns(stg.StgWarning, match="execution='sequential' instead of 'batched'") as caught:
        got, handle = guided(awkward.build("sequence_first"), [3], "batched", batched_cfg=False)
    assert len(caught) == 1
    assert_same(got, expected)
    assert handle.stats.blocks_run == 0


def test_batched_is_checked_again_for_calls_of_another_shape() -> None:
    """Rows that influence each other, once there are enough tokens."""

    class Mixing(zoo.DiT):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            x = super().forward(x, text)
            return x + x.mean(0, keepdim=True) if x.shape[1] > 5 else x

    torch.manual_seed(0)
    model = Mixing().eval()

    def longer(x: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {"x": torch.cat([x, x], dim=1), "text": text}

    def run(execution: str) -> Tensor:
        with stg.apply(model, [2], 1.5, execution=execution):
            model(**zoo.inputs(2))
            return model(**longer(**zoo.inputs(2)))

    expected = run("full")
    with pytest.warns(stg.StgWarning, match="rows influence each other"):
        assert_same(run("batched"), expected)


# --- counted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", zoo.EXECUTIONS)
def test_stats_of_blocks_are_those_that_ran(execution: str) -> None:
    """Against hooks that count, on a model whose layers are not alike; in steady state."""
    model, inputs = zoo.build("two_stacks"), zoo.inputs(4)
    names = zoo.ZOO["two_stacks"].numbered
    rows: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rows.append(args[0].shape[0])

    with stg.apply(model, [1, 3], 1.5, batched_cfg=True, execution=execution) as handle:
        model(**inputs)
        handle.stats.blocks_run = 0
        handles = [model.get_submodule(f"{name}.attn").register_forward_hook(note) for name in names]
        model(**inputs)
        for hook in handles:
            hook.remove()
    assert sum(rows) == len(names) * 4 + 2 * handle.stats.blocks_run
    assert handle.stats.blocks_run == {"full": 3}.get(execution, 2)


class StoringBlock(zoo.Block):
    """Stores what it computes in what it is given, or reads it there."""

    def forward(self, x: Tensor, text: Tensor, cache: dict[str, Tensor], store: bool) -> Tensor:
        key = x.mean(1, keepdim=True)
        if store:
            cache.setdefault("sum", torch.zeros(1)).add_(key.abs().mean())
        return self.mix(x + (0 if store else cache["sum"]), text)


class StoringDiT(zoo.DiT):
    """Fills a cache in the first step and reads it in later ones, as Flux2's with a reference image does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StoringBlock() for _ in range(4))

    def forward(self, x: Tensor, text: Tensor, cache: dict[str, Tensor], store: bool) -> Tensor:
        x = self.embed(x)
        if store:
            cache = {}
        for block in self.blocks:
            x = block(x, text, cache, store)
        return self.out(x)


@pytest.mark.parametrize("execution", SHARING)
@pytest.mark.parametrize("batched_cfg", [False, True])
@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
def test_calls_of_a_layout_that_writes_leave_others_alone(batched_cfg: bool, execution: str) -> None:
    torch.manual_seed(0)
    model = StoringDiT().eval().requires_grad_(False)
    cond = slice(2, None) if batched_cfg else slice(None)
    cache = {"sum": torch.full((1,), 0.3)}
    calls = [{**zoo.inputs(4, seed), "cache": cache, "store": seed in (0, 3)} for seed in range(6)]
    without = copy.deepcopy(model)
    without.blocks[2].forward = lambda x, *_: x
    plains = [model(**call) for call in calls]
    weaks = [without(**call) for call in calls]
    with stg.apply(model, [2], 1.0, batched_cfg=batched_cfg, execution=execution) as guidance:
        got = [model(**call) for call in calls]
    for output, plain, weak in zip(got, plains, weaks, strict=True):
        term = (plain - weak)[cond]
        assert_same(output, plain + (torch.cat([term, term]) if batched_cfg else term))
    assert guidance.stats.blocks_run == 2 * 3 + 4 * 1
