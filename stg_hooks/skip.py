"""Bypass layers of a model: the weak model, made of the same weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn

from stg_hooks.errors import CallError, NotCopied, warn
from stg_hooks.hooks import activation
from stg_hooks.hooks.compiled import is_compiled
from stg_hooks.hooks.forward import Patch, now, patched
from stg_hooks.model.layers import Layer
from stg_hooks.model.resolve import LayerSpec, listed
from stg_hooks.modes.frames import Kind
from stg_hooks.modes.perturbation import Mode
from stg_hooks.modes.switch import Switch
from stg_hooks.passes.caches import Caches
from stg_hooks.passes.learning import is_learning, learn_once, made_ahead


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.is_called = False
        self.depth = 0


class _Chosen:
    """The layers that were asked for; where looking does not find them, the first call tells them."""

    def __init__(self, model: nn.Module, layers: LayerSpec | None, mode: str | Mode, kind: Kind | None) -> None:
        self._model = model
        spec: Any = listed(layers) if isinstance(layers, Iterator) else layers  # may have to be read again
        self._make = partial(Switch, model, spec, mode, kind)
        self.switch = made_ahead(self._make)
        """`None` until they are known."""

    def in_call(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Switch:
        """Return the layers, found by this call if need be.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
        """
        if self.switch is None:
            with _FIRST:
                if self.switch is None:
                    learn_once(self._model, denoiser, args, kwargs)
                    self.switch = self._make()
        return self.switch


class _Entry:
    """One `with`, and the calls of the model inside it."""

    def __init__(self, chosen: _Chosen, model: nn.Module, caches: Caches, scope: str) -> None:
        self._chosen = chosen
        self._is_installed = False
        self._within = ExitStack()
        self._scope = scope
        self._caches = caches
        self._since = now()
        self._model_name = type(model).__name__
        self._is_compiled = is_compiled(model)
        self._local = _OfThread()
        self._patch: Patch | None = None
        self.place: activation.Entry | None = None
        self.calls_elsewhere = 0
        self.has_begun = False
        self.has_ended = False
        self.stack = ExitStack()

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        self._caches.look()
        with self._within as stack:
            if self._chosen.switch is not None:
                self._install(self._chosen.switch)
            self._patch = stack.enter_context(patched(model))
            stack.enter_context(self._patch.everywhere(self._around))
            if not self._is_compiled:  # there, hooks are compiled as well, and what we wrap is the call itself
                stack.enter_context(model.register_forward_pre_hook(self._before, prepend=True))
                stack.enter_context(model.register_forward_hook(self._after, always_call=True))
            self.place = activation.enter(self, self._scope)
            stack.callback(activation.leave, self.place)
            yield

    def _install(self, switch: Switch) -> None:
        with _FIRST:
            if not self._is_installed:
                self._within.enter_context(switch.installed())
                self._is_installed = True

    def _is_here(self) -> bool:
        is_here = activation.is_active(self)
        self.calls_elsewhere += not (is_here or activation.others(self))
        return is_here

    def _before(self, *_: Any) -> None:
        """Tell whether the call that begins is one in which the skip is in force."""
        self._local.is_called = self._is_here()
        if self._local.is_called and self._patch is not None:
            self._patch.check()

    def _after(self, *_: Any) -> None:
        self._local.is_called = self._local.depth > 0  # a model may call itself

    def _around(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Bypass the layers as long as the model runs; hooks alone would not end that after an interrupt."""
        if is_learning() or not (self._is_here() if self._is_compiled else self._local.is_called):
            return proceed(*args, **kwargs)
        self._caches.check_same()
        switch = self._chosen.in_call(proceed, args, kwargs)
        if not self._is_installed:
            self._install(switch)
        switch.check_same()
        self.has_begun = True
        self._local.depth += 1
        try:
            # The step is not known, so cached values of other steps are not used.
            with self._caches.apart(self), switch.switched_on(self._since):
                output = proceed(*args, **kwargs)
        except Exception as error:
            if type(error).__module__ == "torch._dynamo.exc":
                raise CallError(
                    f"torch.compile cannot trace {self._model_name} with layers skipped. If it was compiled as a whole "
                    "with fullgraph=True, use fullgraph=False, or compile its blocks: for block in model.blocks: "
                    "block.compile(fullgraph=True)."
                ) from error
            raise
        finally:
            self._local.depth -= 1
        self.has_ended = True
        return output


class skip(NotCopied):  # noqa: N801 - reads as the verb it is: `with stg.skip(model, layers=[34]):`
    """Bypass chosen layers in every call of a model inside a `with`, in this thread or asyncio task.

    Leaving the `with` restores the model exactly, also after an exception. Nested ones add up; where they name the same
    layer, the inner one counts. A `with` in which a chosen layer was never called ends in a warning.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec | None = None,
        mode: str | Mode = "residual",
        *,
        kind: Kind | None = None,
        scope: str = "context",
        strict: bool = False,
    ) -> None:
        """Choose what to skip; nothing is touched before the `with`.

        Args:
            model: any module that is called inside the `with`; its forward hooks see the calls.
            layers: index (negative ones count from the end), range, dotted name or unambiguous tail of one, glob,
                regular expression (`re.compile(...)`, or text that begins with `re:`) to be found in names, module, or
                a list of those. Where no layer is called so, globs and regular expressions mean modules inside them.
                A dictionary gives each its mode: `{14: "attention", 19: "residual"}`. `stg.layers(model)` shows what
                there is. Left out, `mode="isolated"` acts in all of them. Where looking finds no layers, the first call
                of the model tells them; it is made twice more for that.
            mode: `"residual"` (the block hands its inputs through, and is not computed), `"attention"` (self-attention
                with the identity as its map), another name of docs/how-it-works.md, or a callable that takes a
                `LayerCall` and returns what the layer should return.
            kind: in factorised models, only attention within frames (`"spatial"`) or across them (`"temporal"`).
            scope: where the `with` is in force: in the thread or asyncio task that enters it and the tasks that this
                one starts (`"context"`), or in every thread and task of the process while it is open (`"process"`).
            strict: end the `with` in an error instead of that warning.

        Raises:
            LayerError: a layer that does not exist, is ambiguous, or cannot be skipped in this mode.
            SettingError: an unknown mode or scope.
            TargetError: `model` is not a module, `layers` holds something that does not name a layer, or the model has
                a step cache that cannot be kept out of the calls.

        Source: STG, arXiv 2411.18664, sec. 4.
        """
        self._scope = activation.check_scope(scope)
        self._chosen = _Chosen(model, layers, mode, kind)
        self._caches = Caches(model)
        self._model = model
        self._strict = strict
        self._entries: list[_Entry] = []

    @property
    def layers(self) -> list[Layer]:
        """The layers that are skipped, in running order; none yet where the first call has to tell them."""
        return [] if self._chosen.switch is None else list(self._chosen.switch.layers)

    def __enter__(self) -> skip:
        """Register the hooks."""
        entry = _Entry(self._chosen, self._model, self._caches, self._scope)
        entry.stack.enter_context(entry.installed(self._model))
        with _LOCK:
            if not self._entries and self._chosen.switch is not None:
                self._chosen.switch.forget()
            self._entries.append(entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the model, and report what was not skipped after all.

        Raises:
            CallError: `__enter__` was not called before; or, with `strict`, something was not skipped.
        """
        with _LOCK:
            if not self._entries:
                raise CallError(
                    "stg.skip was left without having been entered. Write: with stg.skip(model, layers=[...]):"
                )
            entry, complaint = self._entries[-1], None
            try:
                # Several threads may have entered this object: leave what was entered here.
                here = [one for one in self._entries if activation.is_active(one)]
                entry = (here or self._entries)[-1]
                complaint = None if kind else self._complaint(entry, is_left_here=bool(here))
            finally:
                self._entries.remove(entry)
                entry.stack.close()
        if complaint and self._strict:
            raise CallError(complaint)
        if complaint:
            warn(complaint)

    def _complaint(self, entry: _Entry, is_left_here: bool) -> str | None:
        model = type(self._model).__name__
        # What is left elsewhere than it was entered, as a generator that threads take turns with, ran there.
        if entry.calls_elsewhere and not (entry.has_begun and is_left_here):
            return (
                f"stg.skip() skipped nothing in {entry.calls_elsewhere} calls of {model}, which were made in other "
                f"threads, tasks or contexts than the one that entered the `with`. {activation.ENTER_THERE}"
            )
        if not entry.has_begun:
            return (
                f"stg.skip() skipped nothing: {model} was not called inside this `with`. The skip acts in calls of the "
                "module that was passed to it, in this thread or asyncio task; not in direct calls of its forward, nor "
                "of its blocks."
            )
        switch = self._chosen.switch
        names = [repr(layer.name) for layer in switch.unreached()] if switch is not None and entry.has_ended else []
        if names:
            return (
                f"stg.skip() did not skip {', '.join(names)}: {model} ran inside this `with` without calling "
                f"{'it' if len(names) == 1 else 'them'} in this thread. Choose layers that it calls: stg.layers(model)."
            )
        return None


def check(
    model: nn.Module, layers: LayerSpec | None = None, mode: str | Mode = "residual", *, kind: Kind | None = None
) -> list[Layer]:
    """Check that layers can be skipped, without touching the model.

    Args:
        model: the module that holds them.
        layers: what to skip, as for `skip`.
        mode: what a skipped layer does instead, as for `skip`.
        kind: which attention of factorised layers, as for `skip`.

    Returns:
        The layers, in running order.

    Raises:
        LayerError: a layer that does not exist, is ambiguous, or cannot be skipped in this mode.
        SettingError: an unknown mode.
        TargetError: `model` is not a module, or `layers` holds something that does not name a layer.
    """
    return list(Switch(model, layers, mode, kind).layers)


_LOCK = threading.Lock()
_FIRST = threading.RLock()  # of those that begin to call a model at the same time, one finds its layers
