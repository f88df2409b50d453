"""Step caches of diffusers (`enable_cache`): a weak pass neither reads nor fills what the pipeline's passes keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from stg_hooks.errors import TargetError

# The hooks that each cache consists of, and whether they come at the ends of the stack: these hand something to each
# other, and break if one of them is bypassed.
_HOOKS = {
    "FBCHeadBlockHook": True,
    "FBCBlockHook": False,
    "MagCacheHeadHook": True,
    "MagCacheBlockHook": False,
    "TaylorSeerCacheHook": False,
    "PyramidAttentionBroadcastHook": False,
    "FasterCacheDenoiserHook": False,
    "FasterCacheBlockHook": False,
}


class StepCaches:
    """What the caches of a model hold, once for the pipeline's own passes and once for each kind of weak pass.

    A weak pass has caches of its own as long as it comes with every pass since the pipeline's were empty. Otherwise it
    is computed without any: counters and differences between steps would be those of other steps.
    """

    def __init__(self, name: str, found: Sequence[tuple[nn.Module, Any]]) -> None:
        """Look at the hooks; change nothing yet.

        Args:
            name: what to call the caches in messages.
            found: modules, and a cache's hook on each.
        """
        from diffusers.hooks.hooks import StateManager

        self.name = name
        self.hooks = [hook for _, hook in found]
        self._ends = [
            module for module, hook in found if _HOOKS[type(hook).__name__] or getattr(hook, "is_tail", False)
        ]
        managers = [value for hook in self.hooks for value in vars(hook).values() if isinstance(value, StateManager)]
        self._managers = list({id(manager): manager for manager in managers}.values())
        # Where a manager keeps what the pipeline calls its prediction; diffusers 0.35 and 0.36 keep the bare name.
        self._slot = "_context" if hasattr(StateManager(object), "_context") else "_current_context"
        self._with_state = [hook for hook in self.hooks if hasattr(hook, "state")]
        self._own: dict[tuple[object, str], tuple[list[Any], list[Any]]] = {}
        self._passes: Counter[object] = Counter()
        self._is_followed = False

    def begin_pass(self) -> None:
        """Take notice of a pass that is not a weak one, before it is made."""
        states = [hook.state for hook in self._with_state]
        if not any(manager._state_cache for manager in self._managers) and not any(s.iteration for s in states):
            self._own.clear()
            self._passes.clear()
            self._is_followed = True
        self._passes[self._context] += 1

    @contextmanager
    def apart(self, key: object, perturbed: Collection[nn.Module], bypassed: bool) -> Iterator[None]:
        """Keep calls of the model away from the caches of the pipeline's own passes within a `with`.

        Args:
            key: tells these calls from others, which have caches of their own; one goes with each other pass.
            perturbed: the modules that are perturbed in these calls.
            bypassed: these are not computed; what is, may have to be, and a cache might decide otherwise.
        """
        context = self._context
        self._passes[key, context] += 1
        in_step = self._is_followed and self._passes[key, context] == self._passes[context]
        ends = {id(module) for module in self._ends}
        with ExitStack() as stack:
            if in_step and (bypassed or not perturbed) and not any(id(module) in ends for module in perturbed):
                stack.enter_context(self._others((key, context)))
            else:
                stack.enter_context(self._none())
            yield

    @property
    def _context(self) -> str:
        """What the pipeline calls the prediction that it is making."""
        context = getattr(self._managers[0], self._slot) if self._managers else None
        return "" if context is None else str(getattr(context, "name", context))

    @contextmanager
    def _others(self, key: tuple[object, str]) -> Iterator[None]:
        """Let the hooks use other caches."""
        before = self._take()
        contexts = [getattr(manager, self._slot) for manager in self._managers]
        if key not in self._own:
            self._own[key] = [{} for _ in self._managers], [type(hook.state)() for hook in self._with_state]
        try:
            self._put(*self._own[key])
            yield
        finally:
            self._put(*before)
            for manager, context in zip(self._managers, contexts, strict=True):
                setattr(manager, self._slot, context)

    def _take(self) -> tuple[list[Any], list[Any]]:
        return [manager._state_cache for manager in self._managers], [hook.state for hook in self._with_state]

    def _put(self, caches: Sequence[Any], states: Sequence[Any]) -> None:
        for manager, cache in zip(self._managers, caches, strict=True):
            manager._state_cache = cache
        for hook, state in zip(self._with_state, states, strict=True):
            hook.state = state

    @contextmanager
    def _none(self) -> Iterator[None]:
        """Let modules compute as if no cache had been enabled."""
        references = [hook.fn_ref for hook in self.hooks]
        before = [reference.forward for reference in references]
        try:
            for reference in references:
                reference.forward = reference.original_forward
            yield
        finally:
            for reference, forward in zip(references, before, strict=True):
                reference.forward = forward


def step_caches(modules: Sequence[nn.Module]) -> StepCaches | None:
    """Find the caches that are enabled on a model, if there are any.

    Args:
        modules: the model and all modules in it.

    Raises:
        TargetError: one that cannot be used together with skip guidance.
    """
    registries = [(module, module.__dict__.get("_diffusers_hook")) for module in modules]
    hooks = [(module, hook) for module, registry in registries for hook in getattr(registry, "hooks", {}).values()]
    found = [(module, hook) for module, hook in hooks if hook._is_stateful or type(hook).__name__ in _HOOKS]
    for module, hook in found:
        _check(type(modules[0]).__name__, module, hook)
    if not found:
        return None
    config = getattr(modules[0], "_cache_config", None)
    name = type(config or found[0][1]).__name__.removesuffix("Config")
    return StepCaches(f"{name} on {type(modules[0]).__name__}", found)


def _check(model: str, module: nn.Module, hook: Any) -> None:
    name = type(hook).__name__
    if name not in _HOOKS:
        raise TargetError(
            f"{model} has a cache that weak passes would read and fill ({name} on {type(module).__name__}), and that "
            "cannot be kept apart for them. Call model.disable_cache(), or use FirstBlockCache, "
            "PyramidAttentionBroadcast, TaylorSeerCache or MagCache."
        )
    if name.startswith("FasterCache") and not hook.is_guidance_distilled:
        raise TargetError(
            f"FasterCache on {model} makes up uncond rows from the cond rows of the same call, and a weak pass has "
            "cond rows only. Call model.disable_cache() and use another cache; or, where every row is conditional, "
            "enable it with FasterCacheConfig(is_guidance_distilled=True, ...)."
        )
