"""What guidance computes, counted: the layers after the skipped one, once more on the cond rows, and nothing else.

The models have their real classes, depths and published layers (benchmarks/shapes.py), and tiny widths.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from benchmarks import measure
from benchmarks.shapes import SHAPES, Inputs, Shape, take
from tests import zoo

DITS = [name for name, shape in SHAPES.items() if shape.blocks]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what a plain call of it costs: in all, in each layer, in all that runs after each layer."""

    shape: Shape
    model: nn.Module
    inputs: Inputs
    plain: int
    own: list[int]
    after: list[int]

    def guided(self, scale: float = 1.0, execution: str = "sequential", calls: int = 2) -> int:
        """Count the FLOPs of the last of several guided calls; in the first one, passes are compared."""
        with stg.apply(
            self.model, layers=[self.shape.skipped], scale=scale, batched_cfg=self.shape.cfg, execution=execution
        ):
            for _ in range(calls - 1):
                self.model(**self.inputs)
            return measure.flops(lambda: self.model(**self.inputs))

    def peak(self) -> int:
        """Count the bytes that a call has in use at once."""
        return measure.peak_memory(lambda: self.model(**self.inputs), torch.device("cpu"))[1]

    @property
    def skipped(self) -> int:
        """What the skipped layer costs on the cond rows."""
        return self.own[self.shape.skipped] // self.shape.rows


@functools.cache
def load(name: str, width: int = 1) -> Case:
    """Build a model, and count what a plain call of it costs.

    Args:
        name: among `SHAPES`.
        width: by how much to widen the hidden states; what goes in and comes out stays.
    """
    shape = SHAPES[name]
    config = dict(shape.tiny.config)
    for key in {"num_attention_heads", "cross_attention_dim"} & config.keys() if width > 1 else ():
        config[key] *= width
    size = dataclasses.replace(shape.tiny, config=config)
    model = shape.build(size)
    inputs = take(shape.inputs(model, size), [0, 1] if shape.cfg else [1])
    layers = [layer.module for layer in stg.layers(model) if layer.index is not None]
    return Case(shape, model, inputs, *measure.flops_of(layers, lambda: model(**inputs)))


@pytest.fixture(params=DITS)
def case(request: pytest.FixtureRequest) -> Case:
    return load(request.param)


@pytest.fixture(autouse=True)
def _plain_inference() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In CPU autocast", category=UserWarning)  # Mochi, in float32
        warnings.simplefilter("error", stg.StgWarning)  # a fallback would be counted as what it is not
        yield


def test_depth_and_block_structure_are_real(case: Case) -> None:
    assert len(case.own) == case.shape.blocks
    assert sum(case.own) > 0.97 * case.plain, "what is counted must be blocks, or the bound says nothing about it"


def reaches_the_bound(case: Case, count: int) -> None:
    """(2L + L - k - 1) / 2L with CFG, (L + L - k - 1) / L without."""
    later = sum(case.own[case.shape.skipped + 1 :]) // case.shape.rows  # HunyuanVideo's blocks differ
    assert count / (case.plain + later) == pytest.approx(1, abs=0.01)
    assert count / case.plain == pytest.approx(case.shape.formula(), rel=0.01)


def test_sequential_reaches_the_bound(case: Case) -> None:
    count = case.guided()
    reaches_the_bound(case, count)
    # Besides the blocks there are the final layers, and embeddings of tokens, text and time, which are not shared.
    assert 0 <= count / (case.plain + case.after[case.shape.skipped] // case.shape.rows) - 1 < 3e-3


def test_batched_reaches_the_bound(case: Case) -> None:
    reaches_the_bound(case, case.guided(execution="batched"))


@pytest.mark.parametrize("execution", ["sequential", "full"])
def test_the_first_call_costs_one_more_weak_pass_at_most(execution: str) -> None:
    case = load("ltx")
    weak = case.guided(execution=execution) - case.plain
    unknown = load.__wrapped__("ltx")  # another model, of which nothing is known
    assert unknown.guided(execution=execution, calls=1) == pytest.approx(case.plain + 2 * weak + case.skipped, rel=1e-3)


def test_unet_computes_what_comes_after_the_skipped_layer() -> None:
    case = load("svd")
    assert len(case.own) == 16
    assert case.guided() / (case.plain + case.after[7] // 2) == pytest.approx(1, abs=0.01)


def test_skipped_block_costs_nothing(case: Case) -> None:
    with stg.skip(case.model, layers=[case.shape.skipped]):
        count = measure.flops(lambda: case.model(**case.inputs))
    assert count == case.plain - case.own[case.shape.skipped]


def test_full_execution_costs_a_pass_less_the_skipped_block(case: Case) -> None:
    expected = case.plain + case.plain // case.shape.rows - case.skipped
    assert case.guided(execution="full") / expected == pytest.approx(1, abs=1e-4)  # Mochi's positions have no rows


def test_scale_zero_costs_nothing(case: Case) -> None:
    for execution in zoo.EXECUTIONS:
        assert case.guided(scale=0.0, execution=execution, calls=1) == case.plain


@pytest.mark.parametrize("layer", [0, 14, 27])
def test_the_later_the_layer_the_cheaper(layer: int) -> None:
    case = load("ltx")
    with stg.apply(case.model, layers=[layer], scale=1.0, batched_cfg=True, execution="sequential"):
        case.model(**case.inputs)
        count = measure.flops(lambda: case.model(**case.inputs))
    assert count / case.plain == pytest.approx(case.shape.formula(layer), rel=0.01)


@pytest.mark.parametrize(
    "name", ["ltx", *(pytest.param(name, marks=pytest.mark.slow) for name in DITS if name != "ltx")]
)
def test_sequential_execution_needs_little_more_memory(name: str) -> None:
    """At most two hidden states of the cond rows more than a plain call.

    In the first one also what the model is given, and a copy of what it keeps besides its parameters.

    As in real models hidden states are wider than predictions, of which guidance makes some copies in the end.
    """
    case = load(name, width=4)
    layers = [layer.module for layer in stg.layers(case.model) if layer.index is not None]
    hidden = measure.hidden_state_bytes(layers[case.shape.skipped], lambda: case.model(**case.inputs))
    plain = case.peak()
    with stg.apply(case.model, [case.shape.skipped], 1.0, batched_cfg=case.shape.cfg, execution="sequential"):
        given = sum(value.nbytes for value in case.inputs.values() if isinstance(value, Tensor))
        kept = sum(buffer.nbytes for buffer in case.model.buffers())
        for once in (given + kept, 0, 0):
            assert case.peak() <= plain + 2 * hidden // case.shape.rows + once


def test_the_count_of_memory_sees_what_is_kept() -> None:
    case = load("ltx")
    kept: list[Any] = []
    plain = case.peak()
    layers = [layer.module for layer in stg.layers(case.model) if layer.index is not None]
    handles = [layer.register_forward_hook(lambda module, args, output: kept.append(output)) for layer in layers]
    assert case.peak() > plain + 20 * kept[0].nbytes
    for handle in handles:
        handle.remove()


def test_attention_of_cpus_is_counted() -> None:
    """torch's own table leaves it out, and the counts above would be of linear layers alone."""
    q = torch.randn(1, 2, 16, 8)
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    assert measure.flops(lambda: attend(q, q, q)) == 2 * (2 * 16 * 16 * 8) * 2
