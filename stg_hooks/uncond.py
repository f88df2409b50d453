"""Let the weak model make the uncond prediction: skip guidance without an extra pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import CallError, SettingError, StgWarning
from stg_hooks.guidance.samples import are_samples, check_told, takes_samples
from stg_hooks.guidance.schedule import Settings
from stg_hooks.guide import Session
from stg_hooks.hooks.compiled import eagerly, is_compiled
from stg_hooks.hooks.forward import Action, patched
from stg_hooks.hosts import check_rows_apart
from stg_hooks.modes.residual import copied
from stg_hooks.passes.effects import Randomness, State, count_of_writes
from stg_hooks.passes.execution import Execution
from stg_hooks.passes.guided_call import checking, in_weak_pass, layout_of, weak_pass
from stg_hooks.passes.predict import Predictor
from stg_hooks.passes.rows import (
    HALF,
    agree,
    first_batch,
    halves,
    own_predictions,
    predictions,
    replace_predictions,
    row_factor,
)
from stg_hooks.passes.streaming import weights_are_streamed
from stg_hooks.step import check_step

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class UncondGuide:
    """Bypasses layers for what a denoiser computes without the prompt.

    In calls with rows `[uncond, cond]`, layers give both, and their rows are put together. That this gives what the
    weak model does is found out in the first call of each layout: its uncond rows are compared with a pass in which
    the layers are bypassed in all rows. Where they differ, such a pass is made in every call from then on.
    """

    def __init__(self, session: Session, model: nn.Module) -> None:
        """Resolve all layers that are known to be skipped; touch nothing.

        Args:
            session: what it shares with the guides of the same pipeline's other denoisers.
            model: the denoiser.
        """
        self._session = session
        self._model = model
        self._predictor = Predictor(model, (), "full", session.guidance.stats)
        self._predictor.prepare(session.guidance.plan.known)
        self._compared: set[Hashable] = set()
        """Kinds of calls that one pass has been found to be right for."""
        self._is_apart = False
        self._check_caches()

    def _check_caches(self) -> None:
        found = self._predictor.caches.found
        if found is not None:
            raise SettingError(
                f"on='uncond' cannot be combined with {found.name}: what the cache keeps of cond and uncond rows is "
                "one. Disable it (model.disable_cache()), or use on='cond', whose weak passes have caches of their own."
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `forward` of the denoiser and of the layers; restore them at the end."""
        with ExitStack() as stack:
            stack.enter_context(self._predictor.installed())
            self._check_caches()
            patch = stack.enter_context(patched(self._model))
            stack.enter_context(patch.everywhere(self._around))
            if not is_compiled(self._model):
                stack.enter_context(self._model.register_forward_pre_hook(patch.check, prepend=True))
            yield

    def _around(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self._session
        role = None if in_weak_pass() else session.role(self._model)
        if role is None:
            return proceed(*args, **kwargs)
        self._predictor.caches.check_same()
        guidance = session.guidance
        guidance.stats.calls += 1
        check_rows_apart(role, "on='uncond'")
        step = check_step(session.step) or session.host.step()
        settings = Settings(()) if role.rows in ("cond", "perturbed") else guidance.settings(step)
        if settings.replaces:
            raise SettingError(f"{settings.why_replaces} cannot be combined with on='uncond' here: use stg.Guider.")
        if not settings.active:
            return proceed(*args, **kwargs)
        execution = self._predictor.of(settings.active)
        guidance.stats.guided_calls += 1
        if role.rows == "uncond":
            with execution.switches[0].switched_on():
                output = proceed(*args, **kwargs)
        else:
            output = self._both(execution, proceed, args, kwargs)
        pairs = [halves(t) if role.rows == "uncond+cond" else (t, None) for t in predictions(output)]
        unconds, conds = [u for u, _ in pairs], [c for _, c in pairs if c is not None]
        # There are no weak predictions to compare with cond ones.
        guidance.watch.look(step, conds, unconds, execution.switches)
        return output

    def _both(self, execution: Execution, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Make a call with rows `[uncond, cond]`: in one pass, where that gives what two would."""
        if takes_samples(args, kwargs):  # halves of a list are no rows of the layers, so far as is known
            return _apart(execution, proceed, args, kwargs)
        (switch,), batch = execution.switches, first_batch(args, kwargs)
        if batch is None or batch % 2:
            raise CallError(f"a call with {batch or 'no'} rows cannot be [uncond, cond], which batched_cfg=True says.")
        if self._is_apart:
            return _apart(execution, proceed, args, kwargs)
        layout = switch.key, layout_of(args, kwargs, HALF)
        with switch.switched_on(instead=lambda action: _for_first_half(action, batch)):
            if layout in self._compared:
                return proceed(*args, **kwargs)
            again, randomness = copied(args, kwargs), Randomness.for_call(args, kwargs)
            # Who moves weights about may move buffers, too.
            state = None if weights_are_streamed(self._model) else State(self._model)
            output = proceed(*args, **kwargs)
        if not isinstance(output, Tensor):
            check_told(are_samples(predictions(output), *again), len(predictions(output)), "on='uncond'")
        if randomness.is_used() or (state is not None and state.is_changed()):
            return output  # the first time that may be a cache; else another pass could not be compared with this one
        output = replace_predictions(output, own_predictions(output))  # the next pass may use their memory
        with torch.no_grad(), checking(), weak_pass(), eagerly(), switch.switched_on():
            own_args, own_kwargs = copied(*again)
            weak = predictions(proceed(*own_args, **own_kwargs))
        if agree(_first_halves(predictions(output)), _first_halves(weak)):
            self._compared.add(layout)
            return output
        self._is_apart = True
        warnings.warn(
            f"the uncond and cond rows of {type(self._model).__name__} cannot be mixed in one pass: it does not give "
            "what the weak model does. From now on on='uncond' makes them in passes of their own.",
            StgWarning,
            stacklevel=2,
        )
        return _apart(execution, proceed, *again)


def _apart(execution: Execution, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Make each prediction in a pass of its own on all rows, of which nothing is assumed."""
    again = copied(args, kwargs)
    weak = own_predictions(execution.full_pass(0, proceed, *copied(args, kwargs)))
    output = proceed(*args, **kwargs)
    if isinstance(output, Tensor):
        samples: bool | None = False
    else:
        samples = check_told(are_samples(weak, *again), len(weak), "on='uncond'")
    if samples:
        half, rest = divmod(len(weak), 2)
        if rest:
            raise CallError(f"a list of {len(weak)} samples cannot be [uncond, cond], which batched_cfg=True says.")
        return replace_predictions(output, [*weak[:half], *predictions(output)[half:]])
    pairs = zip(_first_halves(weak), predictions(output), strict=True)
    return replace_predictions(output, [torch.cat([uncond, plain[len(uncond) :]]) for uncond, plain in pairs])


def _first_halves(tensors: list[Tensor]) -> list[Tensor]:
    return [halves(tensor)[0] for tensor in tensors]


def _for_first_half(action: Action, batch: int) -> Action:
    """Do something instead of `forward` for the first half of the rows, and nothing else for the second one.

    Both work on arguments of their own. Where `forward` writes into its own, the first half of what it has written is
    put right.
    """

    def mixed(forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        own_args, own_kwargs = copied(args, kwargs)
        pairs = zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves((own_args, own_kwargs)), strict=True)
        given = [(one, own, _writes(one)) for one, own in pairs if isinstance(one, Tensor)]
        instead = pytree.tree_leaves(action(forward, own_args, own_kwargs))
        real, spec = pytree.tree_flatten(forward(*args, **kwargs))
        if len(real) != len(instead):
            raise CallError("a skipped layer gave another number of outputs than the real one, so on='uncond' fails.")
        for one, own, writes in given:
            if _writes(one) != writes or (writes is None and not torch.equal(one, own)):
                rows = _uncond_rows("argument", one, batch)
                one[:rows] = own[:rows]

        def joined(ours: Any, theirs: Any) -> Any:
            if not isinstance(theirs, Tensor) or ours is theirs or any(ours is b and theirs is a for a, b, _ in given):
                return theirs
            rows = _uncond_rows(
                "output", theirs, batch, is_alike=isinstance(ours, Tensor) and ours.shape == theirs.shape
            )
            return torch.cat([ours[:rows], theirs[rows:]])

        return pytree.tree_unflatten([joined(*pair) for pair in zip(instead, real, strict=True)], spec)

    return mixed


def _writes(tensor: Tensor) -> object:
    # What is traced cannot ask. Should a block write there, comparing with a pass apart shows it.
    return -1 if torch.compiler.is_compiling() else count_of_writes(tensor)


def _uncond_rows(what: str, tensor: Tensor, batch: int, is_alike: bool = True) -> int:
    """Say how many entries of dimension 0 belong to the first half of the rows."""
    folded = row_factor(tensor, batch)
    if not folded or not is_alike:
        raise CallError(
            f"on='uncond': the rows of a layer's {what} of shape {tuple(tensor.shape)} cannot be told apart in a call "
            f"with {batch} rows. Use stg.Guider, which makes the two predictions in calls of their own."
        )
    return batch // 2 * folded
