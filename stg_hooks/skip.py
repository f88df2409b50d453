"""Bypass layers of a model: the weak model, made of the same weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from stg_hooks import activation
from stg_hooks.layers import Layer, LayerSpec, resolve
from stg_hooks.patching import Action, Patch, patched, pushed
from stg_hooks.perturb import LayerCall, Mode, check_mode, find_mode
from stg_hooks.streams import Streams


class Switch:
    """The skipped layers of one branch: installed once, then switched on around single calls."""

    def __init__(self, model: nn.Module, layers: LayerSpec, mode: str | Mode) -> None:
        """Resolve and check everything; touch nothing.

        Args:
            model: the module that holds the layers.
            layers: what to skip, as for `skip`.
            mode: what a skipped layer does instead, as for `skip`.
        """
        self.mode = find_mode(mode)
        self.layers: list[Layer] = resolve(model, layers)
        check_mode(self.mode, self.layers)
        self._actions = [self._action(layer.module) for layer in self.layers]
        self._patches: list[Patch] = []

    def _action(self, module: nn.Module) -> Action:
        streams, mode = Streams(module), self.mode

        def action(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return mode(LayerCall(module, args, kwargs, streams, forward))

        return action

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `forward` of the layers, without effect until switched on; restore them at the end."""
        with ExitStack() as stack:
            self._patches = [stack.enter_context(patched(layer.module)) for layer in self.layers]
            yield

    @property
    def actions(self) -> dict[int, Action]:
        """What the layers do instead, by `id` of the module."""
        return {id(layer.module): action for layer, action in zip(self.layers, self._actions, strict=True)}

    def on(self) -> list[tuple[Action, ...]]:
        """Bypass the layers in calls from this thread; return what to pass to `off`."""
        return [patch.push(action) for patch, action in zip(self._patches, self._actions, strict=True)]

    def off(self, before: list[tuple[Action, ...]]) -> None:
        """Go back to what calls from this thread did before `on`."""
        for patch, actions in zip(self._patches, before, strict=True):
            patch.restore(actions)

    def switched_on(self) -> AbstractContextManager[None]:
        """Bypass the layers in calls from this thread within a `with`."""
        return pushed(self._patches, self._actions)


class skip:  # noqa: N801 - reads as the verb it is: `with stg.skip(model, layers=[34]):`
    """Bypass chosen layers in every call of a model inside a `with`, in this thread only.

    Leaving the `with` restores the model exactly, also after an exception; so does leaving a nested one.
    """

    def __init__(self, model: nn.Module, layers: LayerSpec, mode: str | Mode = "residual") -> None:
        """Choose what to skip; nothing is touched before the `with`.

        Args:
            model: any module that is called inside the `with`; its forward hooks see the calls.
            layers: index (negative ones count from the end), range, dotted name or unambiguous tail of one, glob,
                module, or a list of those. `stg.layers(model)` shows what there is.
            mode: `"residual"` (the block hands its inputs through, and is not computed), or a callable that takes a
                `LayerCall` and returns what the layer should return.

        Raises:
            LayerError: a layer that does not exist, is ambiguous, or cannot be skipped in this mode.
            SettingError: an unknown mode.
            TargetError: `model` is no module, or `layers` holds something that names no layer.

        Source: STG, arXiv 2411.18664, sec. 4.
        """
        self._switch = Switch(model, layers, mode)
        self._model = model
        self._entered: list[ExitStack] = []
        self._local = threading.local()

    @property
    def layers(self) -> list[Layer]:
        """The layers that are skipped, in running order."""
        return list(self._switch.layers)

    def __enter__(self) -> skip:
        """Register the hooks."""
        with ExitStack() as stack:
            stack.enter_context(self._switch.installed())
            stack.callback(self._after)  # a call that was interrupted has not been through its hook
            stack.enter_context(self._model.register_forward_pre_hook(self._before, prepend=True))
            stack.enter_context(self._model.register_forward_hook(self._after, always_call=True))
            activation.enter(self)
            stack.callback(activation.leave, self)
            self._entered.append(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the model."""
        self._entered.pop().close()

    def _before(self, *_: Any) -> None:
        if activation.is_active(self) and getattr(self._local, "before", None) is None:
            self._local.before = self._switch.on()

    def _after(self, *_: Any) -> None:
        before = getattr(self._local, "before", None)
        if before is not None:
            self._local.before = None
            self._switch.off(before)
