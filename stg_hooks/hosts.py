"""What `apply` asks the caller of a denoiser, and which integration answers for which kind of target."""

from __future__ import annotations

import importlib
import itertools
import operator
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import nn

from stg_hooks.errors import TargetError
from stg_hooks.roles import Role
from stg_hooks.step import Step

# Top-level package of a target's class -> module with a `host(target)` function; imported when first needed. It may
# also have `calling_pipeline()` and `calling_host(pipeline, module)`, which tell what calls a guided module, and
# `plain_attention(attention)`, which has its attention computed where it can be seen.
_INTEGRATIONS = {"diffusers": "stg_hooks.integrations.diffusers.host"}
# Top-level package of an attention module's class -> module with a `plain_attention(attention)` function.
_ATTENTION = {**_INTEGRATIONS, "comfy": "stg_hooks.integrations.comfyui.attention"}
# What a host leaves on modules -> module with a `step_caches(modules)` function.
_MARKS = {"_diffusers_hook": "stg_hooks.integrations.diffusers.caches"}


class Host(Protocol):
    """Answers for one target."""

    @property
    def name(self) -> str:
        """What to call the target in messages."""

    @property
    def knows_guidance_scale(self) -> bool:
        """Whether roles carry a CFG weight, which `rescale` needs."""

    @property
    def tells_when_it_runs(self) -> bool:
        """Whether `watched` looks before each call; otherwise it is up to the end of the `with`."""

    def denoisers(self) -> dict[str, nn.Module]:
        """Return the modules to guide, by the names that the target has for them."""

    def is_calling(self) -> bool | None:
        """Tell whether the call that is being made is the target's own; `None` where anyone may make such calls."""

    def role(self) -> Role | None:
        """Say what the call that is being made is for; `None` if it is not the target's, or none to guide."""

    def step(self) -> Step:
        """Say where in a run the call is made."""

    def check_same(self) -> None:
        """Raise a CallError where the target does not use the denoisers any more that it had."""

    def watched(self) -> AbstractContextManager[None]:
        """Check, within a `with`, for replaced denoisers when the target runs next."""

    def put_back(self) -> None:
        """Undo what the target's run has changed of its denoisers, as an exception of ours is going to end it."""


class StepCaches(Protocol):
    """What a host has a model keep from one step to the next, so that less has to be computed."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def hooks(self) -> Sequence[object]:
        """What it consists of."""

    def begin_pass(self) -> None:
        """Take notice of a pass that is not a weak one, before it is made."""

    def apart(self, key: object, perturbed: Collection[nn.Module], bypassed: bool) -> AbstractContextManager[object]:
        """Keep calls of the model that go with `key` away from what the other passes keep."""


def pipeline_host(target: object) -> Host:
    """Find the host of a pipeline.

    Args:
        target: an object of a class that belongs to a known host library, or derives from one that does.

    Returns:
        Its host.

    Raises:
        TargetError: no integration knows this kind of object.
    """
    for cls in type(target).__mro__:
        module = _INTEGRATIONS.get(cls.__module__.partition(".")[0])
        if module is not None:
            host: Host = importlib.import_module(module).host(target)
            return host
    raise TargetError(
        f"cannot guide a {type(target).__name__}: expected a diffusers pipeline or a torch.nn.Module. For a denoiser "
        "that is a plain function, use stg.Guider(function, model=module, ...)."
    )


def plain_attention(attention: nn.Module) -> AbstractContextManager[object]:
    """Have an attention module compute with torch's own `scaled_dot_product_attention` within a `with`."""
    for cls in type(attention).__mro__:
        module = _ATTENTION.get(cls.__module__.partition(".")[0])
        plain = getattr(importlib.import_module(module), "plain_attention", None) if module is not None else None
        if plain is not None:
            context: AbstractContextManager[object] = plain(attention)
            return context
    return nullcontext()


def step_caches(modules: Sequence[nn.Module]) -> StepCaches | None:
    """Find the step caches of a model.

    Args:
        modules: the model and all modules in it.

    Raises:
        TargetError: one that cannot be used together with skip guidance.
    """
    for mark, name in _MARKS.items():
        if any(map(operator.contains, map(vars, modules), itertools.repeat(mark))):
            found: StepCaches | None = importlib.import_module(name).step_caches(modules)
            return found
    return None


def denoisers_of(target: object) -> dict[str, nn.Module]:
    """Return the denoisers of a module (itself, under an empty name) or of a pipeline."""
    return {"": target} if isinstance(target, nn.Module) else pipeline_host(target).denoisers()


def calling_pipelines() -> Iterator[tuple[Any, object]]:
    """Find the pipeline that makes the present call, and the integration that knows it."""
    for library, name in _INTEGRATIONS.items():
        if library not in sys.modules:
            continue
        integration = sys.modules.get(name) or importlib.import_module(name)  # the latter takes its time
        calling = getattr(integration, "calling_pipeline", None)
        pipeline = None if calling is None else calling()
        if pipeline is not None:
            yield integration, pipeline
