"""Tell what a call of a denoiser is for, in a running pipeline whose code has been read."""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.hosts import Role
from stg_hooks.inspection import parameter_names
from stg_hooks.integrations.pipeline_code import KINDS, Combination, Guards, Site, UnreadableError
from stg_hooks.step import Step

_PLAIN = (
    *(ast.Expression, ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Load),
    *(ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)
_NAME_THEM = "Name them in its code, as in `noise_uncond, noise_cond = noise.chunk(2)`"


def evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Compute a plain expression, in which a pipeline says what it is doing.

    Args:
        node: its syntax tree.
        names: what the names in it stand for.

    Returns:
        Its value.

    Raises:
        LookupError: it holds something else than names, attributes, items, constants, operators and comparisons, or a
            name or attribute that does not exist (yet).
    """
    try:
        return eval(_compiled(node), {"__builtins__": {}}, names)
    except (NameError, AttributeError) as error:
        raise LookupError(str(error)) from error


@functools.lru_cache(maxsize=4096)
def _compiled(node: ast.expr) -> CodeType:
    if not all(isinstance(inner, _PLAIN) for inner in ast.walk(node)):
        raise LookupError(f"cannot evaluate {ast.unparse(node)}")
    # Where it stands in the pipeline's file does not matter; a node that was put there has no place at all.
    return compile(ast.unparse(node), "<pipeline>", "eval")


def holds(guards: Guards, names: Mapping[str, Any]) -> bool:
    """Return whether all conditions are true in a running function."""
    return all(bool(evaluate(guard, names)) for guard in guards)


def role_of(site: Site, names: Mapping[str, Any], sums: dict[int, float]) -> Role | None:
    """Tell what a call is for.

    Args:
        site: what has been read of it.
        names: the variables of the function that makes it.
        sums: keeps what the weights sum to. Of tensors that is looked at once only, as it waits for the GPU; what
            they sum to is a matter of the expression.

    Returns:
        Its role; `None` if its prediction is not used.

    Raises:
        UnreadableError: it is guided in a way that is not understood.
        LookupError: the running function does not say it.
    """
    if site.unless is not None and evaluate(site.unless, names):
        raise UnreadableError(f"it guides its predictions by itself, as {ast.unparse(site.unless)} is true")
    kind, guards = site.kind, site.guards or ()
    if site.context is not None:
        kind = KINDS.get(str(evaluate(site.context, names)), "perturbed")
    if kind == "unused":
        return None
    if kind == "perturbed":
        return Role("perturbed")
    if kind == "uncond":
        weight = _weight(site, names, sums)
        return Role("cond") if weight is None and not site.is_named else Role("uncond", weight)
    is_guided = site.context is not None or ((kind != "cond" or site.guards is not None) and holds(guards, names))
    weight = _weight(site, names, sums) if is_guided else None
    is_guided = is_guided and (site.is_named or weight is not None)
    if kind == "samples":
        return Role("cond+uncond" if is_guided else "cond", weight, samples=True)
    if kind == "cond":
        return Role("cond", weight, uncond_follows=is_guided)
    if is_guided:
        return Role("uncond+cond", weight)
    # Where an `else` takes a prediction in halves, the other branch has other rows.
    if not holds(tuple(guard for guard in guards if _is_else(guard)), names):
        raise UnreadableError(f"it adds perturbed rows of its own, as {ast.unparse(guards[0])} is false")
    return Role("cond")


def _is_else(guard: ast.expr) -> bool:
    return isinstance(guard, ast.UnaryOp) and isinstance(guard.op, ast.Not)


def _weight(site: Site, names: Mapping[str, Any], sums: dict[int, float]) -> float | Tensor | None:
    """Return `g` of `uncond + g * (cond - uncond)`, or `None` if it is not known; without names, if it is not above 1.

    Raises:
        UnreadableError: the running function combines them in another way.
    """
    combination = site.combination
    found = None if combination is None else _combined(combination, names, sums)
    value = found if found is None or isinstance(found, Tensor) else float(found)
    if combination is None or value is None or isinstance(value, Tensor):
        return value if site.is_named else None
    cond, uncond = combination.cond, combination.uncond
    if value < 0 or (value == 0 and not site.is_named):
        if site.is_named:
            raise UnreadableError(f"it calls {uncond} what it uses as cond: {ast.unparse(combination.expression)}")
        if site.kind == "both":
            raise UnreadableError(f"its rows are [{uncond}, {cond}], and {uncond} is used as cond")
        raise UnreadableError("it calls its denoiser for uncond first, before the cond prediction is known")
    return value if site.is_named or value >= 1 else None


def _combined(combination: Combination, names: Mapping[str, Any], sums: dict[int, float]) -> Any:
    try:
        other = next((guard for guard in combination.guards if not evaluate(guard, names)), None)
        if other is not None:
            raise UnreadableError(f"it combines its predictions in another way, as {ast.unparse(other)} is false")
        if any(holds(guards, names) for guards in combination.changes):
            return None
        cond, uncond = combination.cond, combination.uncond
        g = evaluate(combination.expression, {**names, cond: 1.0, uncond: 0.0})
        total = g + evaluate(combination.expression, {**names, cond: 0.0, uncond: 1.0})
    except (LookupError, TypeError):
        return None
    found = sums.get(id(combination)) if hasattr(total, "max") else None
    if found is None:
        found = next((value for value in (1.0, 0.0) if _is_near(total, value)), None)
        if found is None:
            text = ast.unparse(combination.expression)
            raise UnreadableError(f"the weights in {text} do not sum to one")
        sums[id(combination)] = found
    return g if found else None  # 0: a difference, which is added to something


def _is_near(value: Any, wanted: float) -> bool:
    error = abs(value - wanted)
    return float(error.max() if hasattr(error, "max") else error) < 1e-4


@dataclasses.dataclass
class _Made:
    """A call that has been made: where, in which run, and for which latents."""

    place: Any
    run: Any
    latents: weakref.ref[Tensor]
    version: int | None
    copy: Tensor

    def is_for(self, latents: Tensor, version: int | None) -> bool:
        """Return whether it was made with this very tensor."""
        return self.latents() is latents and version is not None and version == self.version


class Latents(threading.local):
    """What the latents of calls say that no name in the code does.

    CFG predicts the same latents twice: in two calls, or in two rows of one. Where the code combines two predictions,
    their latents have to be the same; where it is not seen to, no latents may be predicted twice.
    """

    def __init__(self) -> None:
        """Know of no call."""
        self._settled: set[Any] = set()
        self._last: _Made | None = None

    def check(self, role: Role, place: Any, run: Any, latents: Tensor, step: Step) -> None:
        """Raise where the latents of a call do not go with what the code was understood to do.

        Values are read once for each place and shape of calls, as that waits for the GPU; whether it is the very same
        tensor as before, always.

        Args:
            role: what the call is understood to be for.
            place: where in the code it is made.
            run: what is the same object during a run, and another one in the next.
            latents: what it is made with.
            step: when.

        Raises:
            UnreadableError: they do not.
        """
        version = None if latents.is_inference() else latents._version
        last = self._last if self._last is not None and self._last.run is run else None
        place = place, role.rows, latents.shape
        is_same = last is not None and last.is_for(latents, version)
        self._last = _Made(place, run, weakref.ref(latents), version, latents.detach().clone())
        key = place, None if last is None else last.place
        if latents.device.type == "meta" or (key in self._settled and not is_same):
            return
        is_same = is_same or (last is not None and _equal(last.copy, latents))
        if role.rows == "uncond" and not is_same:
            raise UnreadableError("it combines predictions of different latents, and no name tells which are cond")
        if role.rows == "uncond+cond" and not _equal(*latents.tensor_split(2)):
            raise UnreadableError("it combines rows of different latents, and no name tells which are cond")
        if role.rows == "cond":
            if is_same:
                raise UnreadableError("it predicts the same latents twice in a step, and which are cond is not clear")
            if bool((latents[1:] == latents[:1]).flatten(1).all(1).any()):
                # Samples from the same noise are different from the second step on.
                if step.index == 0 and step.count is not None and step.count > 1:
                    return
                raise UnreadableError("it predicts the same latents twice in a call, and which are cond is not clear")
        self._settled.add(key)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and one.equal(other)


def latents_of(frame: FrameType) -> Tensor | None:
    """Find the latents in the call of a denoiser that a running function is making: the first tensor of some dimensions.

    Args:
        frame: the function's.

    Returns:
        The latents, or a list of them in one tensor; `None` if there are none of one shape.
    """
    call: FrameType | None = None
    inner: FrameType | None = sys._getframe(1)
    while inner is not None and inner is not frame:
        call = inner if inner.f_code is nn.Module.__call__.__code__ else call
        inner = inner.f_back
    if call is None:
        return None
    module, args, kwargs = (call.f_locals[name] for name in ("self", "args", "kwargs"))
    order = parameter_names(module)
    given = [*args, *(kwargs[name] for name in order if name in kwargs)]
    return next((found for value in given if (found := _stacked(value)) is not None), None)


def _stacked(value: Any) -> Tensor | None:
    if isinstance(value, Sequence) and value and all(isinstance(one, Tensor) for one in value):
        same = all(one.shape == value[0].shape for one in value)
        return torch.stack(tuple(value)) if same and value[0].is_floating_point() and value[0].ndim > 1 else None
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else None
