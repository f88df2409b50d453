"""`stg.Predictor`, the way in for hosts: a call, and the weak predictions of its cond rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.hooks.forward import patched
from stg_hooks.passes.execution import EXECUTIONS
from stg_hooks.passes.rows import replace_predictions
from tests import zoo
from tests.test_replaced import by_hand as modular_by_hand
from tests.test_replaced import modular_wan

close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
exact: dict[str, Any] = {"rtol": 0, "atol": 0}
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")

ROWS: dict[str, tuple[Any, list[int]]] = {
    "all": (None, [0, 1, 2, 3]),
    "slice": (slice(2, None), [2, 3]),
    "first half": (slice(2), [0, 1]),
    "every other": (slice(None, None, 2), [0, 2]),
    "indices": ([3, 0, 1], [3, 0, 1]),
    "mask": ([True, False, False, True], [0, 3]),
    "tensor": (torch.tensor([False, True, True, True]), [1, 2, 3]),
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["plain", "image_text", "unet", "two_stacks"])
def test_rows_in_any_order(name: str, rows: str, execution: str) -> None:
    model, (given, listed) = zoo.build(name), ROWS[rows]
    layers = zoo.ZOO[name].numbered[-2:]
    inputs = zoo.inputs(4)
    plain = model(**inputs)
    expected = [zoo.without(model, [layer])(**inputs)[listed] for layer in layers]
    predictor = stg.Predictor(model, [stg.Branch([layer]) for layer in layers], execution)
    with predictor.installed():
        for _ in range(3):
            output, weaks = predictor(model, (), inputs, rows=given)
            assert_close(output, plain, **close)
            for (weak,), right in zip(weaks, expected, strict=True):
                assert_close(weak, right, **close)
    assert (predictor.stats.weak_passes, predictor.stats.calls) == (6, 0)
    assert_close(model(**inputs), plain, **exact)


def test_work_is_shared_for_rows_in_any_order() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs(4)
    predictor = stg.Predictor(model, [stg.Branch([2])])
    with predictor.installed():
        for _ in range(2):
            predictor(model, (), inputs, rows=[3, 1])
    assert predictor.stats.blocks_saved == 2 * 3  # two before the skipped block, and that one


def test_the_example_in_the_docstring_runs() -> None:
    doc = inspect.getdoc(stg.Predictor) or ""
    example = "\n".join(line[4:] for line in doc.splitlines() if line.startswith("    "))
    module, inputs = zoo.build("plain"), zoo.inputs()
    names: dict[str, Any] = {"stg": stg, "module": module, "denoiser": module, "args": (), "kwargs": inputs}
    exec(example.replace("[34]", "[2]"), names)
    assert_close(names["output"], module(**inputs), **exact)
    assert_close(names["weaks"], [[zoo.without(module, ["blocks.2"])(**inputs)]], **close)


def test_nothing_is_left_on_the_model() -> None:
    model = zoo.build("plain")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    predictor = stg.Predictor(model, [stg.Branch([2], mode="values")])

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), predictor.installed():
        predictor(fail, (), zoo.inputs())
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    with pytest.raises(stg.CallError, match=r"outside of `with predictor\.installed\(\):`"):
        predictor(model, (), zoo.inputs())


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "expected some of the rows 0 to 3"), ([4], "rows 0 to 3"), ([1, 1], "each once"), ([True], "mask of 1 rows")],
)
def test_rows_that_the_call_does_not_have(rows: list[Any], message: str) -> None:
    model = zoo.build("plain")
    predictor = stg.Predictor(model, [stg.Branch([2])])
    with predictor.installed(), pytest.raises(stg.CallError, match=message):
        predictor(model, (), zoo.inputs(4), rows=rows)


# --- a node as in ComfyUI: rows of several prompts in one call, which the host's own options describe -----------------


class Options:
    """What the host passes along with a call: which rows belong to which prompt. Tensors alone do not tell."""

    def __init__(self, which: Sequence[int]) -> None:
        self.which = list(which)


class Hosted(nn.Module):
    """A model whose blocks look at the host's options, as ComfyUI's attention patches do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.DiT()

    def forward(self, x: Tensor, text: Tensor, options: Options) -> Tensor:
        assert len(options.which) == len(x)
        shift = torch.tensor([0.1 if which else 0.0 for which in options.which])
        out: Tensor = self.inner(x + shift[:, None, None], text)
        return out


class Node:
    """Wraps calls of a model: 0 marks cond rows, 1 uncond rows."""

    def __init__(self, model: nn.Module, layers: Any) -> None:
        stg.check(model, layers)
        self.predictor = stg.Predictor(model, [stg.Branch(layers)])
        self.weak: Tensor | None = None

    def wrap(self, model: nn.Module, x: Tensor, text: Tensor, options: Options) -> Any:
        conds = [row for row, which in enumerate(options.which) if which == 0]

        def weak_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, text, options = args
            return (x[conds], text[conds], Options([options.which[row] for row in conds])), kwargs

        with self.predictor.installed():
            output, ((self.weak,),) = self.predictor(model, (x, text, options), rows=conds, weak_call=weak_call)
        return output


@pytest.mark.parametrize("which", [[1, 0], [0, 1], [0, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1]])
def test_a_node_whose_host_knows_the_rows(which: list[int]) -> None:
    torch.manual_seed(0)
    model, (x, text) = Hosted().eval().requires_grad_(False), zoo.inputs(len(which)).values()
    conds = [row for row, one in enumerate(which) if one == 0]
    plain = model(x, text, Options(which))
    weak = zoo.without(model, ["inner.blocks.2"])(x, text, Options(which))[conds]
    node = Node(model, [2])
    for _ in range(3):
        assert_close(node.wrap(model, x, text, Options(which)), plain, **exact)
        assert_close(node.weak, weak, **close)
    assert node.predictor.stats.blocks_saved == 3 * 3  # what comes before the skipped block, and that one


def test_a_host_that_cuts_its_arguments_makes_no_calls_with_more_rows() -> None:
    torch.manual_seed(0)
    model, (x, text) = Hosted().eval().requires_grad_(False), zoo.inputs(4).values()
    node = Node(model, [2])
    node.predictor = stg.Predictor(model, [stg.Branch([2])], execution="batched")
    weak = zoo.without(model, ["inner.blocks.2"])(x, text, Options([0, 1, 0, 1]))[[0, 2]]
    for _ in range(3):
        node.wrap(model, x, text, Options([0, 1, 0, 1]))
        assert_close(node.weak, weak, **close)


# --- a guider of diffusers' modular pipelines -------------------------------------------------------------------------


class SkipGuidance(BaseGuidance):
    """The denoiser block makes a weak pass of its own: it is answered with what came with the cond pass."""

    _input_predictions: ClassVar = ["pred_cond", "pred_cond_skip", "pred_uncond"]

    @register_to_config
    def __init__(self, layers: list[int], scale: float = 1.0, guidance_scale: float = 5.0) -> None:
        super().__init__(0.0, 1.0, True)
        self.layers, self.scale, self.guidance_scale = layers, scale, guidance_scale
        self.predictor: stg.Predictor | None = None
        self._stack = ExitStack()
        self._weak: Any = None

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(name == "pred_uncond"), name)
            for name in self._input_predictions
        ]

    @property
    def num_conditions(self) -> int:
        return len(self._input_predictions)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared < 3

    def prepare_models(self, denoiser: nn.Module) -> None:
        self._count_prepared += 1
        if self.predictor is None:
            self.predictor = stg.Predictor(denoiser, [stg.Branch(self.layers)])
        if self._count_prepared < 3:
            self._stack.enter_context(self.predictor.installed())
            patch = self._stack.enter_context(patched(denoiser))
            self._stack.enter_context(patch.everywhere(self._cond if self._count_prepared == 1 else self._skip))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._stack.close()

    def _cond(self, proceed: Any, args: Any, kwargs: Any) -> Any:
        if stg.Predictor.in_weak_pass():
            return proceed(*args, **kwargs)
        assert self.predictor is not None
        output, (weak,) = self.predictor(proceed, args, kwargs)
        self._weak = replace_predictions(output, weak)
        return output

    def _skip(self, proceed: Any, args: Any, kwargs: Any) -> Any:
        return self._weak

    def forward(self, pred_cond: Tensor, pred_cond_skip: Tensor, pred_uncond: Tensor) -> Any:
        pred = stg.combine(pred_cond, pred_cond_skip, pred_uncond, scale=self.scale, guidance_scale=self.guidance_scale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def test_a_guider_of_a_modular_pipeline() -> None:
    pipe, call = modular_wan()
    guider = SkipGuidance(layers=[1])
    pipe.update_components(guider=guider)
    got = pipe(**call, output="latents")
    assert_close(got, modular_by_hand(pipe, call, 5.0), **close)
    assert guider.predictor is not None
    assert guider.predictor.stats.weak_passes == 3
    assert guider.predictor.stats.blocks_saved == 3 * 2
    assert not torch.allclose(got, call["latents"])
