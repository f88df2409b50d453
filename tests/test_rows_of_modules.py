"""`rows=` and `weak_call=` of `stg.apply`: a user says which rows of a module's calls are cond."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import zoo

close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")  # guidance that works says nothing

# What is said of four rows: which are cond, and to which cond row (by its place among them) each row belongs.
SAID: dict[str, tuple[Any, list[int], list[int]]] = {
    "[u, u, c, c]": (slice(2, None), [2, 3], [0, 1, 0, 1]),
    "[c, c, u, u]": (slice(2), [0, 1], [0, 1, 0, 1]),
    "[u, c, u, c]": (slice(1, None, 2), [1, 3], [0, 0, 1, 1]),
    "[c, u, c, u]": ([0, 2], [0, 2], [0, 0, 1, 1]),
    "[c, u, u, c]": ([True, False, False, True], [0, 3], [0, 0, 1, 1]),
    "in the user's order": ([3, 0], [0, 3], [0, 0, 1, 1]),
    "tensor": (torch.tensor([False, True, True, False]), [1, 2], [0, 0, 1, 1]),
    "by name": ("cond+uncond", [0, 1], [0, 1, 0, 1]),
    "by the usual name": ("uncond+cond", [2, 3], [0, 1, 0, 1]),
    "one of four": ([1], [1], [0, 0, 0, 0]),
    "all": (slice(None), [0, 1, 2, 3], [0, 1, 2, 3]),
    "all, by name": ("cond", [0, 1, 2, 3], [0, 1, 2, 3]),
}


@pytest.mark.parametrize("execution", zoo.EXECUTIONS)
@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("name", ["plain", "image_text", "unet"])
def test_each_row_gets_the_term_of_its_cond_row(name: str, said: str, execution: str) -> None:
    rows, conds, owners = SAID[said]
    model, layer, inputs = zoo.build(name), zoo.ZOO[name].numbered[-1], zoo.inputs(4)
    plain, weak = model(**inputs), zoo.without(model, [layer])(**inputs)
    term = 1.5 * (plain - weak)[conds]
    with stg.apply(model, [layer], 1.5, rows=rows, execution=execution) as guidance:
        for _ in range(3):
            assert_close(model(**inputs), plain + term[owners], **close)
    assert guidance.stats.weak_passes == 3


@pytest.mark.parametrize(
    ("conds", "owners"),
    [
        ([0, 1], [0, 1, 0, 1, 0, 1]),
        ([2, 3], [0, 1, 0, 1, 0, 1]),
        ([0, 3], [0, 0, 0, 1, 1, 1]),
        ([1, 4], [0, 0, 0, 1, 1, 1]),
        (list(range(6)), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_several_other_rows_for_each(model: nn.Module, conds: list[int], owners: list[int]) -> None:
    inputs = zoo.inputs(6)
    plain, weak = model(**inputs), zoo.without(model, ["blocks.2"])(**inputs)
    term = (plain - weak)[conds]
    with stg.apply(model, [2], 1.0, rows=conds):
        for _ in range(2):
            assert_close(model(**inputs), plain + term[owners], **close)


@pytest.mark.parametrize("rows", [slice(0, None, 2), "cond+uncond", [0, 1]])
def test_rescale_returns_the_final_prediction_in_every_row(model: nn.Module, rows: Any) -> None:
    inputs, conds = zoo.inputs(4), [0, 2] if isinstance(rows, slice) else [0, 1]
    unconds = [row for row in range(4) if row not in conds]
    plain, weak = model(**inputs), zoo.without(model, ["blocks.2"])(**inputs)[conds]
    cond, uncond = plain[conds], plain[unconds]
    out = uncond + 6.0 * (cond - uncond) + 1.5 * (cond - weak)
    dims = list(range(1, out.ndim))
    final = out * (0.7 * cond.std(dims, keepdim=True) / out.std(dims, keepdim=True) + 0.3)
    with stg.apply(model, [2], 1.5, rescale=0.7, rows=rows, guidance_scale=6.0):
        got = model(**inputs)
    assert_close(got[conds], final, **close)
    assert_close(got[unconds], final, **close)
    with pytest.raises(stg.SettingError, match="guidance_scale="):
        stg.apply(model, [2], 1.5, rescale=0.7, rows=rows).not_to_be_entered()


def test_calls_of_other_sizes(model: nn.Module) -> None:
    weak, other = zoo.without(model, ["blocks.2"]), copy.deepcopy(model)
    with stg.apply(model, [2], 1.0, rows=slice(1, None, 2)):
        for count in (4, 2, 6, 4):
            inputs = zoo.inputs(count)
            plain = other(**inputs)
            term = (plain - weak(**inputs))[1::2]
            assert_close(model(**inputs), plain + term.repeat_interleave(2, 0), **close)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([4], "rows 0 to 3"),
        ([-1], "rows 0 to 3"),
        ([0, 0], "each once"),
        ([], "some of the rows"),
        ([True, False], "a mask of 2 rows"),
        ([0, 2, 4], "rows 0 to 3"),
        ([0, 1, 2], "which of the other 1 belongs"),
        ("cond+uncond+image", "4 rows cannot be"),
    ],
)
def test_rows_that_a_call_does_not_have(model: nn.Module, rows: Any, message: str) -> None:
    plain = model(**zoo.inputs(4))
    with pytest.raises(stg.CallError, match=message), stg.apply(model, [2], rows=rows) as guidance:
        model(**zoo.inputs(4))
    assert guidance.stats.weak_passes == 0
    assert_close(model(**zoo.inputs(4)), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rows": "cond+other"}, "expected the parts"),
        ({"rows": "uncond"}, "expected the parts"),
        ({"rows": 1}, "expected a slice"),
        ({"rows": [0], "batched_cfg": True}, "leave one out"),
        ({"weak_call": lambda args, kwargs: (args, kwargs)}, "pass rows="),
        ({"rows": [0], "on": "uncond"}, "on='uncond'"),
    ],
)
def test_what_cannot_be_said(model: nn.Module, said: dict[str, Any], message: str) -> None:
    with pytest.raises(stg.SettingError, match=message):
        stg.apply(model, [2], **said)


# --- weak_call --------------------------------------------------------------------------------------------------------


class Lengths:
    """Arguments in an object that cannot be looked into."""

    __slots__ = ("scales",)

    def __init__(self, scales: Sequence[float]) -> None:
        self.scales = tuple(scales)


class Hosted(nn.Module):
    """Needs to be told of each row what the tensors do not say."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.build("plain")

    def forward(self, x: Tensor, text: Tensor, lengths: Lengths) -> Tensor:
        scales = torch.tensor(lengths.scales).reshape(-1, 1, 1)
        assert len(scales) == len(x), "a scale for each row"
        return self.inner(x * scales, text)


@pytest.mark.parametrize("execution", zoo.EXECUTIONS)
@pytest.mark.parametrize("said", [{"rows": [0, 2]}, {"rows": "cond+uncond"}, {"batched_cfg": True}], ids=str)
def test_a_function_returns_the_arguments_of_the_cond_rows(said: dict[str, Any], execution: str) -> None:
    conds = {"[0, 2]": [0, 2], "cond+uncond": [0, 1], "None": [2, 3]}[str(said.get("rows"))]
    unconds = [row for row in range(4) if row not in conds]
    model, (x, text) = Hosted(), zoo.inputs(4).values()
    lengths = Lengths([0.5, 1.0, 1.5, 2.0])
    plain = model(x, text, lengths)
    weak = zoo.without(model, ["inner.blocks.2"])(x, text, lengths)

    def weak_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, text, lengths = args
        return (x[conds], text[conds], Lengths([lengths.scales[row] for row in conds])), kwargs

    expected, term = plain.clone(), 1.5 * (plain - weak)[conds]
    expected[conds] += term
    expected[unconds] += term
    with stg.apply(model, [2], 1.5, weak_call=weak_call, execution=execution, **said) as guidance:
        for _ in range(3):
            assert_close(model(x, text, lengths), expected, **close)
    if execution != "full":
        assert guidance.stats.blocks_saved == 3 * 3  # two before the skipped block, and that one


def test_a_function_that_returns_other_rows_is_found_out(model: nn.Module) -> None:
    inputs = zoo.inputs(4)
    plain, weak = model(**inputs), zoo.without(model, ["blocks.2"])(**inputs)
    expected = plain + (plain - weak)[[1, 3]].repeat_interleave(2, 0)

    def weak_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {name: value[[0, 2]] for name, value in kwargs.items()}

    with stg.apply(model, [2], 1.0, rows=[1, 3], weak_call=weak_call):
        with pytest.warns(stg.StgWarning, match="the cond rows alone do not give the cond prediction"):
            found = [model(**inputs) for _ in range(3)]
        for got in (*found, model(**inputs)):
            assert_close(got, expected, **close)


def test_a_function_that_returns_no_arguments(model: nn.Module) -> None:
    guidance = stg.apply(model, [2], 1.0, rows=[1, 3], weak_call=lambda args, kwargs: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(stg.CallError, match=r"weak_call=.*\(args, kwargs\)"), guidance:
        model(**zoo.inputs(4))
