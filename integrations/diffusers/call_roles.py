"""Tell what a call of a denoiser is for, in a running pipeline whose code has been read."""

from __future__ import annotations

import ast
import dataclasses
import sys
import threading
from collections.abc import Mapping, Sequence, Sized
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stg_hooks.integrations.diffusers.call_sites import KINDS, CallSite, RowSplit, UnreadableError
from stg_hooks.integrations.diffusers.combinations import Combination, Guards
from stg_hooks.integrations.diffusers.expressions import evaluate
from stg_hooks.model.source import parameter_names
from stg_hooks.roles import Role
from stg_hooks.step import Step

_IN_ONE = (
    "it predicts the same latents twice in a call, and no name in its code tells that its rows are [uncond, cond] (if "
    "they are, say so there: `uncond, cond = prediction.chunk(2)`; if all are cond, pass the denoiser to stg.apply() "
    "with batched_cfg=False)"
)
_IN_TWO = (
    "it predicts the same latents in two calls, and no name in its code tells which is cond (make that one first, and "
    "let what the other is given have a name there that begins with `negative_`)"
)
_DIFFERENT = "it combines predictions of different latents as if they were cond and uncond, and no name tells that"


def holds(guards: Guards, names: Mapping[str, Any]) -> bool:
    """Return whether all conditions are true in a running function."""
    return all(bool(evaluate(guard, names)) for guard in guards)


def role_of(site: CallSite, names: Mapping[str, Any], sums: dict[int, float]) -> Role | None:
    """Tell what a call is for.

    Args:
        site: what has been read of it.
        names: the variables of the function that makes it.
        sums: keeps what the weights sum to. Tensors are looked at once only, as that synchronises with the GPU; the sum
            is a matter of the expression.

    Returns:
        Its role; `None` if its prediction is not used.

    Raises:
        UnreadableError: it is guided in a way that is not understood.
        LookupError: the running function does not say it.
    """
    if site.unless is not None and evaluate(site.unless, names):
        raise UnreadableError(f"it guides its predictions by itself, as {ast.unparse(site.unless)} is true")
    kind = site.kind
    if kind == "both":
        return _role_of_parts(site.splits, site.predictions, names, sums)
    if kind == "named" and site.context is not None:
        kind = KINDS.get(str(evaluate(site.context, names)), "perturbed")
    if kind == "unused":
        return None
    if kind == "perturbed":
        if site.combination is not None and _weight(site.combination, True, names, sums) is None:
            raise UnreadableError(f"its weights in {ast.unparse(site.combination.expression)} are not known")
        return Role("perturbed")
    if kind == "cond" and _is_alone(site, names):
        return Role("cond")
    is_guided = site.kind == "named" or kind == "uncond" or (site.guards is not None and holds(site.guards, names))
    weight = _weight(site.combination, site.is_named, names, sums) if is_guided else None
    is_guided = is_guided and (site.is_named or weight is not None)
    if kind == "samples":
        return Role("cond+uncond" if is_guided else "cond", weight, samples=True)
    if kind == "uncond" and is_guided:
        return Role("uncond", weight)
    return Role("cond", weight, uncond_follows=kind == "cond" and is_guided)


def _is_alone(site: CallSite, names: Mapping[str, Any]) -> bool:
    """Tell whether a guider has asked for one call only, so that nothing is combined with its prediction."""
    try:
        batches = None if site.batches is None else evaluate(site.batches, names)
    except LookupError:
        return False
    return isinstance(batches, Sized) and len(batches) == 1


def _role_of_parts(
    splits: Sequence[RowSplit], predictions: Sequence[str], names: Mapping[str, Any], sums: dict[int, float]
) -> Role | None:
    """Tell what a call is for whose rows are taken apart in one of these ways, or in none."""
    for split in splits:
        if not holds(split.guards, names):
            continue
        weight = _weight_of_split(split, names, sums)
        if split.is_named or weight is not None:
            others = [other for other in splits if other.rows == split.rows and holds(other.guards, names)]
            weights = {other.prediction: _weight_of_split(other, names, sums) for other in others}
            each = tuple(one for name in predictions if (one := weights.get(name, weight)) is not None)
            is_known = len(each) == len(predictions)
            differs = is_known and any(isinstance(one, Tensor) or one != each[0] for one in each[1:])
            role = Role(split.rows, each if differs else weight, uncond_follows=split.uncond_follows)
            return _in_turn(role) if split.in_turn else role
    if not any("cond" in split.rows.split("+") for split in splits):
        return None
    # Where an `else` takes a prediction in halves, the other branch has other rows.
    guards = (guard for split in splits for guard in split.guards)
    other = next((guard for guard in guards if _is_else(guard) and not evaluate(guard, names)), None)
    if other is not None:
        raise UnreadableError(f"it adds perturbed rows of its own, as {ast.unparse(other)} is false")
    return Role("cond")


def _in_turn(role: Role) -> Role:
    """Return the role of rows whose labels come again and again."""
    first, count = role.parts.index("cond"), len(role.parts)
    rows = "+".join(sorted(role.parts))  # not as parts in this order: what is listed says more
    return dataclasses.replace(role, rows=rows, listed=slice(first, None, count))


def _weight_of_split(split: RowSplit, names: Mapping[str, Any], sums: dict[int, float]) -> float | Tensor | None:
    weights = [_weight(combination, split.is_named, names, sums) for combination in split.combinations]
    return weights[0] if len(weights) == 1 else None


def _is_else(guard: ast.expr) -> bool:
    return isinstance(guard, ast.UnaryOp) and isinstance(guard.op, ast.Not)


def _weight(
    combination: Combination | None, is_named: bool, names: Mapping[str, Any], sums: dict[int, float]
) -> float | Tensor | None:
    """Return `g` of `uncond + g * (cond - uncond)`; `None` if it is not known, or tells no more than names do."""
    try:
        found = None if combination is None else _combined(combination, names, sums)
    except UnreadableError:
        if is_named:
            raise
        return None
    if found is None or combination is None or isinstance(found, Tensor):
        return found if is_named else None
    if found < 0 and is_named:
        raise UnreadableError(
            f"it calls {combination.uncond} what it uses as cond: {ast.unparse(combination.expression)}"
        )
    return float(found) if is_named or found >= 1 else None


def _combined(combination: Combination, names: Mapping[str, Any], sums: dict[int, float]) -> Any:
    """Evaluate the weight that cond has; `None` where it is not known, or there are more than cond and uncond.

    Raises:
        UnreadableError: the running function combines the predictions in another way.
    """
    expression, others = combination.expression, combination.others
    try:
        other = next((guard for guard in combination.guards if not evaluate(guard, names)), None)
        if other is not None:
            raise UnreadableError(f"it combines its predictions in another way, as {ast.unparse(other)} is false")
        if any(holds(guards, names) for guards in combination.changes):
            return None
        without = dict.fromkeys((combination.cond, combination.uncond, *others), 0.0)
        weights = [evaluate(expression, {**names, **without, name: 1.0}) for name in without]
        g, total = weights[0], sum(weights)
    except (LookupError, TypeError):
        return None
    found = sums.get(id(combination)) if hasattr(total, "max") else None
    if found is None:
        found = next((value for value in (1.0, 0.0) if _is_near(total, value)), None)
        if found is None:
            raise UnreadableError(f"the weights in {ast.unparse(expression)} do not sum to one")
        sums[id(combination)] = found
    if others:
        return None
    return g if found else _with_cond(combination, names)  # 0: a difference, which is added to something


def _with_cond(combination: Combination, names: Mapping[str, Any]) -> Any:
    """Return the weight of cond in the sum of itself and a difference, whatever else is added; `None` if it is none."""
    added, cond, uncond = combination.added, combination.cond, combination.uncond
    if added is None:
        return None
    without = {node.id: 0.0 for node in ast.walk(added.sum) if isinstance(node, ast.Name) and node.id != "self"}
    try:
        weight, other = (
            evaluate(added.difference, {**names, cond: 0.0, uncond: 0.0, name: 1.0}) for name in (cond, uncond)
        )
        own, scale = (evaluate(added.sum, {**names, **without, name: 1.0}) for name in (cond, added.name))
    except (LookupError, TypeError):
        return None
    return 1.0 + weight if own == scale == 1.0 and not isinstance(other, Tensor) and other == -weight else None


def _is_near(value: Any, wanted: float) -> bool:
    error = abs(value - wanted)
    return float(error.max() if hasattr(error, "max") else error) < 1e-4


class _Made(NamedTuple):
    """A call that has been made."""

    run: object
    key: object
    latents: Tensor
    version: int | None
    copy: Tensor


class Latents(threading.local):
    """What the latents of calls say where no name in the code does.

    CFG predicts the same latents twice, in two calls or in two rows of one. Two predictions that the code was seen to
    combine must be for the same latents, and none may be predicted twice where it was not seen to.
    """

    def __init__(self) -> None:
        """Know of no call."""
        self._settled: set[object] = set()
        self._last: _Made | None = None

    def check(self, role: Role, place: object, run: object, latents: Tensor, step: Step) -> None:
        """Raise where the latents of a call do not go with what it was understood to be for.

        Values of an accelerator are read once for each place and shape of calls, as that waits for it.

        Args:
            role: what the call was understood to be for.
            place: where in the code it is made.
            run: an object that the run has for itself.
            latents: what it is made with.
            step: when.

        Raises:
            UnreadableError: they do not go with it.
        """
        version = None if latents.is_inference() else latents._version
        last = self._last if self._last is not None and self._last.run is run else None
        here = place, role.rows, latents.shape
        self._last = _Made(run, here, latents, version, latents.detach().clone())
        key = here, None if last is None else last.key
        is_same = last is not None and last.latents is latents and last.version == version is not None
        if latents.is_meta or (key in self._settled and not is_same and not latents.is_cpu):
            return
        is_same = is_same or (last is not None and _equal(last.copy, latents))
        is_doubled = bool((latents[1:] == latents[:1]).flatten(1).all(1).any())
        is_pair = is_same if role.rows == "uncond" else _equal(*latents.tensor_split(2))
        if role.rows != "cond" and not is_pair:
            raise UnreadableError(_DIFFERENT)
        if role.rows == "cond" and is_same:
            raise UnreadableError(_IN_TWO)
        if role.rows == "cond" and is_doubled:
            if step.index == 0 and step.count is not None and step.count > 1:
                return  # samples from the same noise differ from the second step on
            raise UnreadableError(_IN_ONE)
        self._settled.add(key)


def _equal(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device) and one.equal(other)


def latents_of(frame: FrameType) -> Tensor | None:
    """Find the latents in the call of a denoiser that a function is making: the first argument of some dimensions.

    Args:
        frame: the running function's.

    Returns:
        The latents, a list of them in one tensor; `None` if there are none, or none of one shape.
    """
    call, inner = None, sys._getframe(1)
    while inner is not frame and inner.f_back is not None:
        call = inner if inner.f_code is nn.Module.__call__.__code__ else call
        inner = inner.f_back
    if call is None:
        return None
    module, args, kwargs = (call.f_locals[name] for name in ("self", "args", "kwargs"))
    order = {name: place for place, name in enumerate(parameter_names(module))}
    for value in (*args, *(kwargs[name] for name in sorted(kwargs, key=lambda name: order.get(name, len(order))))):
        if isinstance(value, (list, tuple)) and len({getattr(one, "shape", None) for one in value}) == 1:
            value = torch.stack(tuple(value)) if isinstance(value[0], Tensor) else None
        if isinstance(value, Tensor) and value.ndim > 1:
            return value
    return None
