"""The skipped layers of one branch: on or off in one thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from stg_hooks.errors import CallError, LayerError
from stg_hooks.hooks.checkpointing import checkpointed, skipped_in
from stg_hooks.hooks.forward import Action, Patch, now, patched
from stg_hooks.model.layers import Layer, find_layers
from stg_hooks.model.resolve import LayerSpec, resolve
from stg_hooks.modes.attention import AttentionSeam
from stg_hooks.modes.feed_forward import FeedForwards, Silence
from stg_hooks.modes.frames import Kind
from stg_hooks.modes.isolation import Isolation
from stg_hooks.modes.modes import MODES, check_layers_given, check_one_mode, find_mode
from stg_hooks.modes.perturbation import LayerCall, Mode, Perturbation
from stg_hooks.modes.residual import Streams
from stg_hooks.modes.sites import Site, all_for, find_sites
from stg_hooks.modes.text_tokens import TextTokens
from stg_hooks.modes.token_probe import Looks


class Switch:
    """The skipped layers of one branch: installed once, then switched on around single calls."""

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec | None,
        mode: str | Mode,
        kind: Kind | None = None,
        known: list[Layer] | None = None,
    ) -> None:
        """Resolve and check everything; change nothing yet.

        Args:
            model: the module that holds the layers.
            layers: what to skip, as for `skip`.
            mode: what a skipped layer does instead, as for `skip`, where `layers` does not say it of each.
            kind: which attention of factorised layers, as for `skip`.
            known: all layers of the model, where they have been found already.
        """
        self._model = model
        self._kind = kind
        known = find_layers(model) if known is None and isinstance(model, nn.Module) else known
        chosen = _chosen(model, layers, find_mode(mode), known)
        self.layers: list[Layer] = [layer for layer, _ in chosen]
        self._sites = find_sites(model, chosen, kind, known or ())
        self._modes = [site.mode for site in self._sites]
        self.modules = [site.module for site in self._sites]
        """The modules that differ in the weak pass: the layers, or the blocks around perturbed attention."""
        _check_tokens_are_whole(model, self._sites)
        self._changes_attention = any(mode.needs in ("attention", "anything") for mode in self._modes)
        self._looks = Looks(model) if self._changes_attention else None
        self._seams = [self._seam(site) for site in self._sites]
        self._feed_forwards = [FeedForwards(module) for module in self.modules]
        self._isolations = [Isolation(module) for module in self.modules]
        self._reached = {id(module): _Reached() for module in self.modules}
        parts = zip(self._sites, self._seams, self._feed_forwards, self._isolations, strict=True)
        self.actions = {id(of_site[0].module): self._action(*of_site) for of_site in parts}
        """What the modules do instead, by `id`."""
        self._patches: list[Patch] = []

    @property
    def is_custom(self) -> bool:
        """Whether a mode of the user's decides what layers do."""
        return any(type(mode) not in map(type, MODES.values()) for mode in self._modes)

    @property
    def is_bypass(self) -> bool:
        """Whether none of the layers is computed at all."""
        return all(mode.is_bypass for mode in self._modes)

    @property
    def bypassed(self) -> list[nn.Module]:
        """The modules that are not computed at all."""
        return [site.module for site in self._sites if site.mode.is_bypass]

    def _seam(self, site: Site) -> AttentionSeam:
        named = {layer.name for layer in site.layers}
        text = TextTokens(self._looks) if self._looks is not None and site.mode.sees_text else None
        return AttentionSeam(site.module, site.targets, text, named)

    def _action(self, site: Site, seam: AttentionSeam, feed_forwards: FeedForwards, isolation: Isolation) -> Action:
        module, mode, name = site.module, site.mode, site.layers[0].name
        streams, reached = Streams(module), self._reached[id(module)]
        memory: dict[str, Any] = {}

        def action(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            reached.yet = reached.now = True
            call = LayerCall(module, args, kwargs, streams, forward, seam, feed_forwards, isolation, memory, name)
            return mode(call)

        return action

    def check_same(self) -> None:
        """Raise where a layer was replaced in the model since, so that what would be skipped is not called any more.

        Raises:
            LayerError: one was.
        """
        for layer in self.layers:
            found: Any = self._model
            for name in layer.name.split(".") if layer.name else ():
                found = getattr(found, "_modules", {}).get(name)
            if found is layer.module or (found is not None and any(m is layer.module for m in found.modules())):
                continue  # the latter: one that calls it, as torch.compile() gives
            raise LayerError(
                f"layer {layer.name!r} of {type(self._model).__name__} was replaced after it had been chosen: it was "
                f"{_phrase(layer.module)} and is {_phrase(found)} now. Make stg.apply(), stg.skip() or stg.Guider() "
                "anew, after what replaces layers (as enable_free_noise() does)."
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `forward` of the layers, without effect until switched on; restore them at the end."""
        self.check_same()
        with ExitStack() as stack:
            self._patches = [stack.enter_context(patched(module)) for module in self.modules]
            silenced: dict[str, Sequence[Silence]] = {"feed-forward": self._feed_forwards, "streams": self._isolations}
            for number, (mode, seam) in enumerate(zip(self._modes, self._seams, strict=True)):
                if mode.needs in silenced:
                    stack.enter_context(silenced[mode.needs][number].installed())
                if mode.needs in ("attention", "anything"):
                    stack.enter_context(seam.installed())
            if self._looks is not None:
                stack.enter_context(self._looks.installed())
            yield

    @contextmanager
    def switched_on(self, since: int | None = None) -> Iterator[None]:
        """Bypass the layers in calls from this thread within a `with`.

        Args:
            since: when this was asked for; where a layer is skipped twice, the later wish counts. Now, if left out.

        Raises:
            CallError: a layer's `forward` was set by other code since, and it was not skipped.
        """
        since = now() if since is None else since
        before: list[tuple[Action | None, int]] = []
        outer = len(checkpointed()) if torch.is_grad_enabled() and not torch.compiler.is_compiling() else None
        modules = {id(module): module for module in self.modules}
        try:
            for patch, (key, action) in zip(self._patches, self.actions.items(), strict=True):
                before.append(
                    patch.replace(action if outer is None else _checkpointed(action, modules[key], outer), since)
                )
                # Where another `with` skips this layer, that one checks it.
                self._reached[key].now = before[-1][1] > since
                if self._reached[key].now:
                    self._reached[key].yet = True
            yield
            self._check_in_place()
        finally:
            for patch, previous in zip(self._patches, before, strict=False):
                patch.put_back(previous)

    def _check_in_place(self) -> None:
        for module, patch in zip(self.modules, self._patches, strict=True):
            if not self._reached[id(module)].now and not patch.is_in_place():
                raise CallError(
                    f"something else has set the forward of {type(module).__name__} inside the `with`, so it is not "
                    "skipped any more. Add and remove hooks, caches and offloading before stg.apply() or stg.skip()."
                )

    @property
    def was_reached(self) -> bool:
        """Whether the model has called one of the layers while they were switched on the last time."""
        return any(reached.now for reached in self._reached.values())

    def forget(self) -> None:
        """Start afresh with what `unreached` tells."""
        for reached in self._reached.values():
            reached.yet = False

    def unreached(self) -> list[Layer]:
        """List the layers that the model has not called since the last `forget`, while they were switched on."""
        return [layer for site in self._sites if not self._reached[id(site.module)].yet for layer in site.layers]

    @property
    def key(self) -> Hashable:
        """What is equal for switches that do the same to the same layers."""
        return self._kind, tuple((site.mode, tuple(layer.name for layer in site.layers)) for site in self._sites)

    def described(self) -> list[tuple[str, str]]:
        """Name the layers, each with its mode, for other processes."""
        return [(layer.name, str(site.mode)) for site in self._sites for layer in site.layers]

    def complaint(self, equal: int, calls: int) -> str | None:
        """Say that the layers were not called, or that skipping them changed nothing, and why that may be.

        Args:
            equal: in how many guided calls the weak prediction was equal to cond, bit for bit.
            calls: out of how many.
        """
        unreached = self.unreached()
        names = ", ".join(repr(layer.name) for layer in unreached or self.layers)
        if unreached:
            return (
                f"the denoiser did not call {names}, so nothing was skipped there: most likely a part that it does not "
                "use in these calls, or calls in another thread"
            )
        if not equal:
            return None
        if self.is_bypass:
            cause = "the block adds nothing (untrained, or its gate is zero), or nothing uses what it returns"
        else:
            modes = " or ".join(dict.fromkeys(map(str, self._modes)))
            cause = f"what {modes} changes adds nothing there (untrained, or its gate is zero)"
        where = "" if equal == calls else f" in {equal} of {calls} guided calls"
        return (
            f"skipping {names} changed nothing{where}: the weak prediction equals cond bit for bit. Most likely "
            f"{cause}, or a cache answers in its place"
        )


def _checkpointed(action: Action, module: nn.Module, outer: int) -> Action:
    """Do the same, so that gradients are right where the layer is checkpointed."""

    def checked(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with skipped_in(module, outer):
            return action(forward, args, kwargs)

    return checked


@dataclasses.dataclass
class _Reached:
    # Only ever written in a call: what torch.compile reads, it guards, and would compile again when it changes.
    yet: bool = False
    now: bool = False


def _chosen(
    model: nn.Module, layers: object, mode: Perturbation, known: list[Layer] | None
) -> list[tuple[Layer, Perturbation]]:
    """Find the layers that were asked for, in running order, each with its mode."""
    check_layers_given(layers, mode)
    if not isinstance(layers, Mapping):
        spec = all_for(model, mode, known or ()) if layers is None else layers
        return [(layer, mode) for layer in resolve(model, spec, known)]
    check_one_mode(layers, mode)
    ordered = resolve(model, list(layers), known)
    pairs = [(layer, find_mode(own)) for spec, own in layers.items() for layer in resolve(model, spec, known)]
    found: dict[str, Perturbation] = {}
    for layer, own in pairs:
        if found.setdefault(layer.name, own) != own:
            raise LayerError(f"layers= gives {layer.name!r} two modes: {found[layer.name]} and {own}. Leave one out.")
    return [(layer, found[layer.name]) for layer in ordered]


def _check_tokens_are_whole(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise where context parallelism (of diffusers) would make a skip do something else than on one device."""
    splits = {id(m) for m in model.modules() if any(name.startswith("cp_") for name in _hook_names(m))}
    if not splits:
        return
    for site in sites:
        if site.mode.mixes_tokens:
            raise LayerError(
                f"{site.mode} mixes all tokens, of which context parallelism gives each device a part. Use 'residual'."
            )
        for layer in site.layers:
            if site.mode.is_bypass and id(layer.module) in splits:
                raise LayerError(
                    f"layer {layer.name!r} cannot be skipped: at its entrance context parallelism splits the tokens "
                    "over devices. Choose another layer: stg.layers(model)."
                )


def _phrase(module: nn.Module | None) -> str:
    return "not there" if module is None else f"a {type(module).__name__} of id {id(module):#x}"


def _hook_names(module: nn.Module) -> Iterable[str]:
    names: Iterable[str] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return names
