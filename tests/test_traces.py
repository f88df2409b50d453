"""Nothing is left behind: no cycle that keeps a model alive, no growth, nothing in what is saved or copied inside."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests import pipelines, zoo

LAYER = 2


def _skip(model: nn.Module) -> Any:
    return stg.skip(model, [LAYER])


def _apply(model: nn.Module, **settings: Any) -> Any:
    session = stg.apply(model, [LAYER], **{"batched_cfg": True, **settings})
    session.step = stg.Step(0, 4)
    return session


SESSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "skip": _skip,
    "guider": lambda model: stg.Guider(model, [LAYER], guidance_scale=3.0),
    "apply sequential": lambda model: _apply(model, execution="sequential"),
    "apply batched": lambda model: _apply(model, execution="batched"),
    "apply full": lambda model: _apply(model, execution="full"),
    "apply every": lambda model: _apply(model, every=2),
    "apply rescale": lambda model: _apply(model, rescale=0.7, guidance_scale=3.0),
    "apply values": lambda model: _apply(model, mode="values"),
    "apply scheduled": lambda model: _apply(model, schedule=lambda step: {"layers": [1]}),
    "apply on uncond": lambda model: _apply(model, on="uncond"),
}
sessions = pytest.mark.parametrize("make", SESSIONS.values(), ids=SESSIONS.keys())


@sessions
@pytest.mark.parametrize("ends", ["left", "with an error", "never entered"])
def test_a_model_is_freed_at_once(make: Callable[[nn.Module], Any], ends: str) -> None:
    """As soon as nobody holds it, without the garbage collector: there is no cycle."""
    model = zoo.build("plain")
    gone = [weakref.ref(module) for module in model.modules()]
    gc.disable()
    try:
        session = make(model)
        if ends == "left":
            with session:
                for _ in range(2):
                    model(**zoo.inputs(4))
                gone.append(weakref.ref(copy.deepcopy(model)))
        elif ends == "with an error":
            _fail(session, model)
        gone.append(weakref.ref(session))
        del model, session
        assert [ref() for ref in gone if ref() is not None] == []
    finally:
        gc.enable()


def _other(*_: Any) -> None:
    """Stand for a hook of others."""


def _fail(session: Any, model: nn.Module) -> None:
    try:
        with session:
            model(**zoo.inputs(4))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


@pytest.mark.parametrize("settings", [{}, {"on": "uncond"}, {"rescale": 0.7}], ids=str)
def test_a_guider_is_freed_at_once(settings: dict[str, Any]) -> None:
    model = zoo.build("plain")
    x, text = zoo.inputs().values()
    guider = stg.Guider(model, [LAYER], guidance_scale=3.0, **settings)
    gone = weakref.ref(model), weakref.ref(guider)
    gc.disable()
    try:
        for _ in range(2):
            guider(x, cond={"text": text}, uncond={"text": 0 * text})
        del model, guider
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


# --- what is saved and copied inside ----------------------------------------------------------------------------------


@sessions
def test_what_is_copied_or_saved_inside_is_the_plain_model(make: Callable[[nn.Module], Any]) -> None:
    """And outside it is what it was, byte for byte."""
    model, inputs = zoo.build("plain"), zoo.inputs(4)
    model.register_forward_pre_hook(_other)
    model.blocks[LAYER].register_forward_hook(_other)
    plain, keys, pickled = model(**inputs), list(model.state_dict()), pickle.dumps(model)
    with make(model):
        model(**inputs)
        assert list(model.state_dict()) == keys
        assert pickle.dumps(model) == pickled
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _saved(model)]
        for copied in copies:
            assert torch.equal(copied(**inputs), plain)
        # a copy knows nothing of the `with`, and outlives it
    assert pickle.dumps(model) == pickled
    for copied in copies:
        assert zoo.snapshot(copied)["modules"].keys() == zoo.snapshot(model)["modules"].keys()
        assert zoo.is_plain(copied)
        assert len(copied._forward_pre_hooks) == len(copied.blocks[LAYER]._forward_hooks) == 1  # those of others
        assert not {id(one) for one in copied.parameters()} & {id(one) for one in model.parameters()}
        assert torch.equal(copied(**inputs), plain)


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def test_weights_loaded_inside_are_used(tmp_path: Path) -> None:
    """`load_state_dict` and `save_pretrained` inside the `with` of a pipeline."""
    pipe, call, case = pipelines.build("wan")
    call, model = {**call, "num_inference_steps": 1}, pipe.transformer
    halved = {name: 0.5 * value for name, value in model.state_dict().items()}

    def guided(session: Any) -> Tensor:
        with session:
            return pipelines.run(pipe, call)

    other = pipelines.build_transformer(case)
    other.load_state_dict(halved)
    other_pipe = pipelines.build_pipeline(case, other)
    with stg.apply(other_pipe, [1]):
        expected = pipelines.run(other_pipe, call)
    with stg.apply(pipe, [1]):
        before = pipelines.run(pipe, call)
        model.load_state_dict(halved)
        assert torch.equal(pipelines.run(pipe, call), expected)
        pipe.transformer.save_pretrained(tmp_path)
    assert not torch.equal(before, expected)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {
        name: value.tolist() for name, value in halved.items()
    }
