"""Every denoiser that diffusers exports: found, skipped exactly, guided exactly in every way, and restored."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import stg_hooks as stg
from tests import installed, model_table, tiny_models, zoo
from tests.tiny_models import MODELS, HandThrough, expand

SCALE = 0.7
SOME_QUERIES = {"Cosmos3OmniTransformer"}
BLOCKS = [pytest.param(name, block, id=f"{name}-{block}") for name, tiny in MODELS.items() for block in tiny.skips]


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@functools.cache
def model_of(name: str) -> nn.Module:
    if not hasattr(pytest.importorskip("diffusers"), name):
        pytest.skip("this version of diffusers does not have it")
    return MODELS[name].build(name)


@torch.no_grad()
def run(name: str, model: nn.Module | None = None) -> list[Tensor]:
    return tensors((model or model_of(name))(**MODELS[name].inputs()))


@functools.cache
def base(name: str) -> list[Tensor]:
    return run(name)


def without_block(name: str, block: str) -> list[Tensor]:
    """What the model predicts with one block replaced by a module that hands its inputs through."""
    model = model_of(name)
    replaced = copy.deepcopy(model)
    replaced.set_submodule(block, HandThrough(model.get_submodule(block), MODELS[name].skips[block]))
    return run(name, replaced)


def with_own_values(name: str, block: str) -> list[Tensor] | None:
    """What the model predicts where every token of one block's self-attention gets its own value.

    `None` where this cannot tell: without torch's attention function, or where queries come from some of the tokens
    only. The configurations see to it that queries and keys are of one number in self-attention only.
    """
    inside, seen = False, False
    plain = F.scaled_dot_product_attention

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal seen
        if not inside or query.shape[-2] != key.shape[-2]:
            return plain(query, key, value, *args, **kwargs)
        seen = True
        return value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)

    def switch(*_: Any) -> None:
        nonlocal inside
        inside = not inside

    if name in SOME_QUERIES:
        return None
    module = model_of(name).get_submodule(block)
    with (
        pytest.MonkeyPatch.context() as patch,
        module.register_forward_pre_hook(switch),
        module.register_forward_hook(switch),
    ):
        patch.setattr(F, "scaled_dot_product_attention", sdpa)
        output = run(name)
    return output if seen else None


ORACLES: dict[str, Callable[[str, str], list[Tensor] | None]] = {
    "residual": functools.cache(without_block),
    "values": with_own_values,
}


# They take and return a tensor per sample: halves of the list are uncond and cond.
LISTS_OF_SAMPLES = ("WanAnimate2Transformer3DModel", "ZImageTransformer2DModel")


def weak(name: str, block: str) -> list[Tensor]:
    output = ORACLES["residual"](name, block)
    assert output is not None
    return output


def attempt(name: str) -> tuple[list[Tensor], Exception | None]:
    """Run a model that may be refused, by us or by the model itself."""
    try:
        return run(name), None
    except (stg.StgError, RuntimeError, ValueError) as error:
        return [], error


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-5 * float(e.std()) + 1e-12)


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    for cached in (model_of, base, ORACLES["residual"]):
        cached.cache_clear()


def test_every_class_of_diffusers_is_configured_or_explained() -> None:
    diffusers = pytest.importorskip("diffusers")
    exported, known = set(tiny_models.exported()), set(MODELS) | set(tiny_models.EXPLAINED)
    assert not exported - known, "add them to tests/tiny_models.py"
    if diffusers.__version__.startswith(f"{installed.DIFFUSERS}."):
        assert not known - exported


def test_the_table_of_models_is_up_to_date() -> None:
    assert model_table.FILE.read_text(encoding="utf-8") == model_table.page(), "run `python -m tests.model_table`"


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found_and_numbered_in_running_order(name: str) -> None:
    model, tiny = model_of(name), MODELS[name]
    found = list(stg.layers(model))
    names = [path for path, _ in model.named_modules()]
    numbered = [layer.name for layer in found if layer.index is not None]
    assert sorted(numbered) == sorted(expand(tiny.layers, names))
    assert {layer.name for layer in found if layer.index is None} == set(expand(tiny.named, names))
    assert zoo.calls(model, numbered, lambda: run(name)) == numbered


@pytest.mark.parametrize("mode", ORACLES)
@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_a_skip_equals_its_oracle(name: str, block: str, mode: str) -> None:
    model, plain = model_of(name), base(name)
    expected = ORACLES[mode](name, block)
    with stg.skip(model, [block], mode=mode):
        actual, error = attempt(name)
    close(run(name), plain)
    if error is not None:
        assert mode != "residual", error
        assert MODELS[name].attention or "is cross-attention" in str(error), error
        return
    assert any(float((a - p).abs().max()) > 1e-3 * float(p.std()) for a, p in zip(actual, plain, strict=True))
    if expected is not None:
        close(actual, expected)


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_silenced_feed_forward_networks_change_the_prediction_or_are_not_there(name: str, block: str) -> None:
    try:
        session = stg.skip(model_of(name), [block], mode="feed-forward")
    except stg.LayerError as error:
        assert "has no feed-forward network to silence" in str(error)  # noqa: PT017 - where it is raised
        return
    with session:
        actual = run(name)
    assert any(float((a - p).abs().max()) > 1e-3 * float(p.std()) for a, p in zip(actual, base(name), strict=True))


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    """List what was said, but for what is right to say of models that predict a variance as well."""
    said = [str(warning.message) for warning in caught if issubclass(warning.category, stg.StgWarning)]
    return [text for text in said if "learned variance" not in text]


@pytest.mark.parametrize("way", ["full", "sequential"])
@pytest.mark.parametrize("name", MODELS)
def test_guidance_equals_two_passes(name: str, way: str) -> None:
    block = next(reversed(MODELS[name].skips))
    plain = base(name)
    expected = [p + SCALE * (p - w) for p, w in zip(plain, weak(name, block), strict=True)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with stg.apply(model_of(name), [block], SCALE, execution=way):
            close(run(name), expected)
    assert not told(caught) or (way != "full" and MODELS[name].alone), told(caught)


@pytest.mark.parametrize("way", ["sequential", "batched"])
@pytest.mark.parametrize("name", MODELS)
def test_guidance_of_calls_with_uncond_and_cond_rows(name: str, way: str) -> None:
    """Exact, or refused with an error where the table says so; batched falls back with a warning where it says so."""
    tiny = MODELS[name]
    block = next(reversed(tiny.skips))
    plain = base(name)
    differences = [SCALE * (p - w) for p, w in zip(plain, weak(name, block), strict=True)]
    if name in LISTS_OF_SAMPLES:
        terms = differences[len(differences) // 2 :] * 2
        expected = [p + term for p, term in zip(plain, terms, strict=True)]
    else:
        terms = [difference[len(difference) // 2 :] for difference in differences]
        expected = [p + torch.cat([term, term]) if len(p) > 1 else p for p, term in zip(plain, terms, strict=True)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with stg.apply(model_of(name), [block], SCALE, batched_cfg=True, execution=way):
            actual, error = attempt(name)
    if error is not None:
        assert tiny.rows, error
        return
    assert not told(caught) or tiny.alone or tiny.rows or (way == "batched" and tiny.batched), told(caught)
    close(actual, expected)
