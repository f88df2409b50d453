"""What cannot work is refused: before anything is touched, with a type to catch and a text that says what to type."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import stg_hooks as stg
from tests import zoo
from tests.zoo import snapshot

THIRTY = re.escape("DiT has 30 layers (0...29).")
SEE = re.escape(" See stg.layers(model).")


def thirty() -> nn.Module:
    """Of 30 layers, as in the text of our style guide."""
    return zoo.DiT(depth=30).eval()


@pytest.fixture(params=["skip", "guider", "apply", "branch"])
def use(request: pytest.FixtureRequest) -> Callable[..., object]:
    """The ways to name layers. Each is refused when it is built, before any `with` and any call."""
    return {
        "skip": lambda model, layers: stg.skip(model, layers=layers),
        "guider": lambda model, layers: stg.Guider(model, layers=layers),
        "apply": lambda model, layers: stg.apply(model, layers=layers),
        "branch": lambda model, layers: stg.apply(model, branches=[stg.Branch([0]), stg.Branch(layers)]),
    }[request.param]


@pytest.fixture
def untouched() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Remember models, and assert at the end that they are what they were."""
    seen: list[tuple[nn.Module, dict[str, Any]]] = []

    def remember(model: nn.Module) -> nn.Module:
        seen.append((model, snapshot(model)))
        return model

    yield remember
    assert seen
    for model, before in seen:
        assert snapshot(model) == before


# --- layers -----------------------------------------------------------------------------------------------------------

BAD_LAYERS: list[tuple[str, Any, type[Exception], str]] = [
    ("too high", [40], LookupError, rf"^layers=\[40\]: {THIRTY}{SEE}$"),
    ("too high, bare", 30, LookupError, rf"^layers=\[30\]: {THIRTY}{SEE}$"),
    ("too low", [-31], LookupError, rf"^layers=\[-31\]: {THIRTY}{SEE}$"),
    ("one of two (trap 6)", [1, 99], LookupError, rf"^layers=\[99\]: {THIRTY}{SEE}$"),
    ("end of a range", range(28, 31), LookupError, rf"^layers=\[30\]: {THIRTY}"),
    (
        "misspelt",
        ["block.3"],
        LookupError,
        rf"of that name\. Did you mean 'blocks\.3'(, 'blocks\.3\.\w+')*\? {THIRTY}{SEE}$",
    ),
    ("a number too high", ["blocks.99"], LookupError, rf"DiT has no module of that name\. {THIRTY}{SEE}$"),
    ("two numbers", "2-5", LookupError, rf"^layers=\['2-5'\]: DiT has no module of that name\. {THIRTY}{SEE}$"),
    ("nothing near", "zzz", LookupError, rf"^layers=\['zzz'\]: DiT has no module of that name\. {THIRTY}{SEE}$"),
    ("number as a string", ["40"], LookupError, r"^layers=\['40'\] is not .* For an index write layers=\[40\]\.$"),
    ("glob without a match", "blocks.x*", LookupError, rf"^layers=\['blocks\.x\*'\] matches no layer\. {THIRTY}{SEE}$"),
    (
        "ambiguous",
        ["attn"],
        LookupError,
        r"^layers=\['attn'\] is ambiguous: 30 modules of DiT end in it \('blocks\.0\.attn', .*, \.\.\.\)",
    ),
    ("empty name", "", LookupError, r"^layers=\[''\]"),
    ("empty list", [], LookupError, rf"^layers=\[\] names no layer\. {THIRTY}$"),
    ("empty range", range(0), LookupError, r"^layers=range\(0, 0\) names no layer\."),
    ("float", 3.0, TypeError, r"^layers=\[3\.0\]: expected an index, .* not float\.$"),
    ("None in a list", [1, None], TypeError, r"^layers=\[None\]: expected an index, .* not NoneType\.$"),
    ("bool", True, TypeError, r"^layers=\[True\]: expected an index, a name or a module, not a bool\.$"),
    ("bool in a list", [1, False], TypeError, r"^layers=\[False\]: .* not a bool\.$"),
    ("bytes", b"blocks.1", TypeError, r"expected an index, .* not bytes\.$"),
    ("tensor", torch.tensor([1]), TypeError, r"expected an index, .* not Tensor\.$"),
    (
        "of another model",
        nn.Linear(2, 2),
        LookupError,
        rf"^layers=\[Linear\(\.\.\.\)\]: that module is not inside .*{SEE}$",
    ),
    (
        "attention in residual mode",
        ["blocks.2.attn"],
        LookupError,
        r"^layers=\['blocks\.2\.attn'\]: mode='residual' bypasses whole blocks, .* mean layers=\['blocks\.2'\]\?$",
    ),
]


@pytest.mark.parametrize(
    ("layers", "builtin", "text"), [row[1:] for row in BAD_LAYERS], ids=[row[0] for row in BAD_LAYERS]
)
def test_bad_layers(use: Callable[..., object], layers: Any, builtin: type, text: str, untouched: Any) -> None:
    with pytest.raises(stg.StgError, match=text) as error:
        use(untouched(thirty()), layers)
    assert isinstance(error.value, builtin)
    assert isinstance(error.value, stg.TargetError if builtin is TypeError else stg.LayerError)


def test_a_model_without_stacks_says_how_to_name_its_blocks(untouched: Any) -> None:
    for name, example in (("no_stacks", "first"), ("no_attention", "blocks.0")):
        model = untouched(zoo.build(name))
        with pytest.raises(stg.LayerError, match=r"^layers=\[[01]\]: \w+ has no numbered layers: ") as error:
            stg.check(model, [1])
        assert f'Pass modules or dotted names of its blocks (layers=["{example}"])' in str(error.value)
        stg.skip(model, example)  # what the message says works


def test_suggestions_name_the_nearest_layers() -> None:
    with pytest.raises(stg.LayerError, match=re.escape("Did you mean 'noise_refiner.1'")):
        stg.skip(zoo.build("refined"), "noise_refinr.1")
    with pytest.raises(stg.LayerError, match=re.escape("Did you mean 'inner_model.blocks.2'")):
        stg.skip(zoo.build("wrapped"), "inner_modl.blocks.2")


# --- settings ---------------------------------------------------------------------------------------------------------

BAD_SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("NaN", {"scale": math.nan}, r"^scale=nan: expected a finite number\. Use scale=0\.0 to switch it off\.$"),
    ("inf", {"scale": math.inf}, r"^scale=inf: expected a finite number\."),
    ("string", {"scale": "1.0"}, r"^scale='1\.0': expected a number, not str\. Write scale=1\.$"),
    ("bool", {"scale": True}, r"^scale=True: expected a number, not bool\.$"),
    ("list", {"scale": [1.0]}, r"^scale=\[1\.0\]: expected a number, not list\.$"),
    ("rescale above 1", {"rescale": 1.5}, r"^rescale=1\.5: expected a number from 0\.0 \(off\) to 1\.0 \(full\)\.$"),
    ("rescale below 0", {"rescale": -0.1}, r"^rescale=-0\.1: expected a number from 0"),
    ("rescale NaN", {"rescale": math.nan}, r"^rescale=nan: expected a number from 0"),
    ("rescale string", {"rescale": "full"}, r"^rescale='full': expected a number from 0"),
    ("mode", {"mode": "residul"}, r"^unknown mode 'residul'; choose from 'residual'.* Did you mean 'residual'\?$"),
    ("mode, nothing near", {"mode": "zzz"}, r"^unknown mode 'zzz'; choose from .*, or pass a callable\.$"),
    ("mode, empty", {"mode": ""}, r"^unknown mode ''; choose from .*, or pass a callable\.$"),
    ("mode, number", {"mode": 3}, r"^mode=3: expected a name or a callable, not int\.$"),
    ("guidance NaN", {"guidance_scale": math.nan}, r"^guidance_scale=nan: expected a finite number"),
    (
        "guidance string",
        {"guidance_scale": "4"},
        r"^guidance_scale='4': expected a number, not str\. Write guidance_scale=4\.$",
    ),
    ("both", {"branches": [stg.Branch([1])]}, r"^give either branches=\[\.\.\.\], or layers, scale, mode and kind"),
    ("empty branches", {"layers": None, "branches": []}, r"^branches=\[\]: expected a list of stg\.Branch\(layers, "),
    (
        "one branch",
        {"layers": None, "branches": stg.Branch([1])},
        r"^branches=Branch\(.*: expected a list of stg\.Branch",
    ),
    ("no list of branches", {"layers": None, "branches": 3}, r"^branches=3: expected a list of stg\.Branch"),
    ("no branches", {"layers": None, "branches": [[1]]}, r"^branches=\[\[1\]\]: expected a list of stg\.Branch\("),
    ("both scales", {"layers": None, "scale": 1.0, "branches": [stg.Branch([1])]}, r"^give either branches="),
    (
        "nothing published",
        {"layers": None},
        r"^no layers given, and no setting is published for this DiT\. stg\.layers\((model|pipe)\) lists",
    ),
]


@pytest.mark.parametrize("make", [stg.Guider, stg.apply])
@pytest.mark.parametrize(("settings", "text"), [row[1:] for row in BAD_SETTINGS], ids=[row[0] for row in BAD_SETTINGS])
def test_bad_settings(make: Callable[..., object], settings: dict[str, Any], text: str, untouched: Any) -> None:
    with pytest.raises(stg.SettingError, match=text) as error:
        make(untouched(thirty()), **{"layers": [1], **settings})
    assert isinstance(error.value, stg.StgError)
    assert isinstance(error.value, ValueError)


def test_bad_settings_of_a_branch_are_refused_where_it_is_written() -> None:
    with pytest.raises(stg.SettingError, match="scale=nan: expected a finite number"):
        stg.Branch([1], math.nan)
    with pytest.raises(stg.SettingError, match=r"unknown mode 'residul'.* Did you mean 'residual'\?"):
        stg.Branch([1], mode="residul")


def test_bad_modes_of_a_skip(untouched: Any) -> None:
    with pytest.raises(stg.SettingError, match=r"unknown mode 'Residual'.* Did you mean 'residual'\?"):
        stg.skip(untouched(thirty()), [1], mode="Residual")
    with pytest.raises(stg.SettingError, match="expected a name or a callable, not NoneType"):
        stg.skip(untouched(thirty()), [1], mode=None)  # type: ignore[arg-type]


def test_a_published_setting_for_another_size_is_mentioned_where_its_layers_exist() -> None:
    model = zoo.FAMILIES["mochi"].build()
    with pytest.raises(
        stg.SettingError, match=r"is published for this MochiTransformer3DModel\. stg\.layers\(model\) "
    ):
        stg.apply(model)
    model.transformer_blocks.extend(copy.deepcopy(model.transformer_blocks[0]) for _ in range(35))
    with pytest.raises(
        stg.SettingError,
        match=r"^no layers given, .* for this MochiTransformer3DModel\. For others of its class there is layers=\[34\] "
        r"for Mochi 1 with \{'num_layers': 48\}: start from these\.",
    ):
        stg.apply(model)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [None, "model", 3, object(), [thirty()]], ids=["None", "str", "int", "object", "list"]
)
def test_targets_that_are_no_modules(target: Any) -> None:
    for attempt, text in (
        (lambda: stg.skip(target, [1]), r"^expected a torch\.nn\.Module to find layers in, not \w+\.$"),
        (
            lambda: stg.apply(target, [1]),
            r"^cannot guide a \w+: expected a diffusers pipeline or a torch\.nn\.Module\.",
        ),
        (lambda: stg.layers(target), r"expected a diffusers pipeline or a torch\.nn\.Module"),
        (lambda: stg.Guider(target, [1]), r"^denoiser must be callable, not \w+\.$"),
    ):
        with pytest.raises(stg.TargetError, match=text) as error:
            attempt()
        assert isinstance(error.value, stg.StgError)
        assert isinstance(error.value, TypeError)


def test_a_function_is_a_denoiser_only_with_its_model() -> None:
    with pytest.raises(
        stg.TargetError, match=r"is not a torch\.nn\.Module, so its layers cannot be found: .* model=\.\.\., or"
    ):
        stg.Guider(lambda x: x, [1])
    with pytest.raises(stg.TargetError, match=r"use stg\.Guider\(function, model=module, \.\.\.\)"):
        stg.apply(lambda x: x, [1])
    with pytest.raises(stg.TargetError, match=r"expected a torch\.nn\.Module to find layers in, not str"):
        stg.Guider(lambda x: x, [1], model="model")  # type: ignore[arg-type]


# --- combine ----------------------------------------------------------------------------------------------------------


def test_bad_arguments_of_combine() -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 4)
    table: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((a, b), {}, stg.TargetError, r"^weak has shape \(2, 4\), but cond has \(2, 3\)\.$"),
        ((a, [a, b]), {}, stg.TargetError, r"^weak has shape \(2, 4\), but cond has \(2, 3\)\.$"),
        ((a, a, b), {}, stg.TargetError, r"^uncond has shape \(2, 4\), but cond has \(2, 3\)\.$"),
        ((a, a, 1.0), {}, stg.TargetError, r"^uncond must be a tensor, not float\.$"),
        ((a, None), {}, stg.TargetError, r"^weak must be a tensor, or a list of them, not NoneType\.$"),
        ((a, 3.0), {}, stg.TargetError, r"^weak must be a tensor, or a list of them, not float\.$"),
        (
            (a, a),
            {"rule": "zero-star"},
            stg.SettingError,
            r"^unknown rule 'zero-star'; choose from 'cfg'.*Did you mean 'ze",
        ),
        ((a, a), {"rule": stg.rules.AveragedApg}, stg.SettingError, r"^rule=AveragedApg is a class: pass an object"),
        ((a, a), {"rule": 3}, stg.SettingError, r"^rule=3: expected a name or a callable, not int"),
        ((a, a), {"rule": lambda *_: None}, stg.TargetError, r"^rule=<lambda> returned a NoneType: expected a tensor"),
        ((a, a), {"rule": lambda c, *_: c.mean()}, stg.TargetError, r"returned shape \(\): expected .* of cond, \(2"),
        ((a, ["weak"]), {}, stg.TargetError, r"^weak must be a tensor, or a list of them, not str\.$"),
        (([1.0], a), {}, stg.TargetError, r"^cond must be a tensor, not list\.$"),
        ((a, SimpleNamespace(sample=a)), {}, stg.TargetError, r"not SimpleNamespace\. Pass weak\.sample\.$"),
        ((SimpleNamespace(sample=a), a), {}, stg.TargetError, r"not SimpleNamespace\. Pass cond\.sample\.$"),
        (
            (a, a),
            {"scale": [1.0, 2.0]},
            stg.SettingError,
            r"^1 weak predictions but 2 scales: give one, or one per branch\.$",
        ),
        ((a, [a, a]), {"scale": [1.0]}, stg.SettingError, r"^2 weak predictions but 1 scales"),
        ((a, a), {"scale": math.nan}, stg.SettingError, r"^scale=nan: expected a finite number"),
        ((a, [a, a]), {"scale": [1.0, math.inf]}, stg.SettingError, r"^scale=inf: expected a finite number"),
        ((a, a), {"scale": "1"}, stg.SettingError, r"^scale='1': expected a number, not str"),
        ((a, a), {"guidance_scale": None}, stg.SettingError, r"^guidance_scale=None: expected a number, not NoneType"),
        (
            (a, a),
            {"scale": torch.ones(3)},
            stg.SettingError,
            r"^scale has shape \(3,\), which does not fit predictions of shape \(2, 3\)\. Pass a number, one value",
        ),
        ((a, a), {"scale": torch.ones(2, 3, 1)}, stg.SettingError, r"^scale has shape \(2, 3, 1\), which does not fit"),
        ((a, a, a), {"guidance_scale": torch.ones(3, 1)}, stg.SettingError, r"^guidance_scale has shape \(3, 1\), wh"),
        ((a, a), {"rescale": 1.5}, stg.SettingError, r"^rescale=1\.5: expected a number from 0\.0 \(off\) to 1\.0"),
    ]
    for args, kwargs, kind, text in table:
        with pytest.raises(kind, match=text):
            stg.combine(*args, **kwargs)


def test_every_error_has_a_fitting_builtin() -> None:
    for kind, builtin in (
        (stg.LayerError, LookupError),
        (stg.SettingError, ValueError),
        (stg.TargetError, TypeError),
        (stg.BlockError, RuntimeError),
        (stg.CallError, RuntimeError),
    ):
        assert issubclass(kind, stg.StgError)
        assert issubclass(kind, builtin)
        assert str(kind("layers=['a']: no.")) == "layers=['a']: no."  # a KeyError would put it in quotes
    assert issubclass(stg.StgWarning, UserWarning)


# --- hints ------------------------------------------------------------------------------------------------------------


def test_a_hint_for_a_pipeline_names_the_pipeline() -> None:
    """Who passes a pipeline has no `model`: what is printed is pasted."""
    from stg_hooks import demo

    pipe = demo.load()
    with pytest.raises(stg.LayerError, match=re.escape("See stg.layers(pipe).")):
        stg.apply(pipe, layers=[99])
    with pytest.raises(stg.SettingError, match=re.escape("stg.layers(pipe) lists what can be skipped")) as error:
        stg.apply(pipe)
    assert "layers=[2] for Wan 2.1 1.3B" in str(error.value), "published for its family"
    assert "two thirds" not in str(error.value)
    with pytest.raises(stg.LayerError, match=re.escape("See stg.layers(model).")):
        stg.apply(pipe.transformer, layers=[99])
    assert len(list(stg.layers(pipe))) >= 8


@pytest.mark.parametrize(
    ("asked", "here"),
    [("pag", "values"), ("PAG", "values"), ("SEG", "smoothed"), ("tpg", "shuffled"), ("STG_R", "residual"),
     ("STG-A", "attention"), ("SLG", "residual"), ("mlp", "feed-forward")],
)  # fmt: skip
def test_names_of_modes_from_elsewhere_are_translated(asked: str, here: str) -> None:
    with pytest.raises(stg.SettingError, match=rf"^unknown mode '{asked}'; .* Here it is called mode='{here}'\."):
        stg.skip(thirty(), [1], asked)
    stg.check(thirty(), [1], here if here != "feed-forward" else "residual")


@pytest.mark.parametrize(("asked", "number"), [("1.0", "1"), ("0.5", "0.5"), (" 2 ", "2")])
def test_a_number_in_a_string_is_shown_as_a_number(asked: str, number: str) -> None:
    with pytest.raises(stg.SettingError, match=rf"Write scale={number}\.$"):
        stg.apply(thirty(), layers=[1], scale=asked)  # type: ignore[arg-type]
