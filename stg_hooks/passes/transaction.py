"""Passes that leave nothing changed in what a model keeps from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from stg_hooks.errors import CallError, warn
from stg_hooks.hooks.compiled import is_compiled
from stg_hooks.hooks.forward import Action, patched, pushed
from stg_hooks.model.attention import is_attention
from stg_hooks.passes.effects import Randomness
from stg_hooks.passes.guided_call import GuidedCall
from stg_hooks.passes.state import Copies, Kept, Snapshot

if TYPE_CHECKING:
    from stg_hooks.modes.switch import Switch


class Transactions:
    """What one model keeps from call to call, around the calls that are guided.

    A weak pass begins with what the model kept before the cond pass, and leaves what it kept after it. In calls that
    reuse what earlier ones have computed, as step caches do, each branch reuses what it has computed itself.
    """

    def __init__(self, model: nn.Module, switches: Sequence[Switch], with_buffers: bool) -> None:
        """Change nothing yet.

        Args:
            model: the denoiser.
            switches: the branches.
            with_buffers: not where offloading hooks move buffers about.
        """
        self._model = model
        self._switches = switches
        self.kept = Kept(model, with_buffers)
        self.keeps_state = False
        """Calls change what the model keeps."""
        self._keeps_tensors = False
        self._runs: dict[Hashable, set[str]] = {}
        """By the layout of a call in which the model keeps something, the parts that run in it."""
        # What is compiled would be compiled anew for each look.
        self._parts = {} if any(map(is_compiled, model.modules())) else _parts_of(model)
        self._copies = [Copies() for _ in switches]

    @contextmanager
    def cond_pass(self, call: GuidedCall, before: Snapshot) -> Iterator[Randomness]:
        """Track what the cond pass of a call changes; yields where torch's random numbers stood before it."""
        args, kwargs = call.inputs.given
        call.before, is_counted = before, call.layout in self._runs
        randomness = Randomness.for_call(args, kwargs)
        with noting_parts(self._parts) if is_counted else nullcontext(set[str]()) as run:
            yield randomness
        if randomness.is_used():
            call.random_before, call.random_after = randomness, Randomness.for_call(args, kwargs)
        call.after = self.kept.look(before)
        call.changes_state = call.changes_state or (call.after is not before and before.differs())
        self.keeps_state = self.keeps_state or call.changes_state
        self._keeps_tensors = self._keeps_tensors or (call.changes_state and before.has_new_tensors())
        if is_counted:
            self._compare_runs(call, run)

    def _compare_runs(self, call: GuidedCall, run: set[str]) -> None:
        """Tell by the parts that run whether a call reuses what earlier ones have computed."""
        known = self._runs[call.layout]
        call.reuses = not known <= run
        # The first pass to be counted was a weak one, without what lies in its skipped layers.
        skipped = [module for switch in self._switches for module in switch.modules]
        inside = {id(inner) for module in skipped for inner in module.modules()}
        if any(id(self._parts[name]) not in inside for name in run - known):
            warn(
                f"{type(self._model).__name__} computes more in this call than in those before, which were guided. "
                "If they reused what earlier calls had left, so did their weak passes, and guidance was not exact. "
                "Let guidance begin in a step in which everything is computed."
            )
        known |= run

    @contextmanager
    def transaction(self, call: GuidedCall, branch: int | None = None) -> Iterator[None]:
        """Let a pass begin where the cond pass of a call has begun, and leave nothing behind.

        Args:
            call: the call, after its cond pass.
            branch: the branch whose own copies are reused where the call reuses anything.

        Raises:
            CallError: what the branch would reuse is not known.
        """
        before, after = call.before, call.after
        if before is None or after is None:
            yield
            return
        if after is not before:
            before.put_back()
        if call.random_before is not None:
            call.random_before.put_back()
        try:
            if branch is not None and call.reuses:
                has_own = self._copies[branch].use(before, after)
                if not has_own and (self._keeps_tensors or self.kept.replaced()):
                    raise self._unknown()
            yield
            if branch is not None and self.keeps_state:
                self._copies[branch].keep(before)
        finally:
            after.put_back()
            if call.random_after is not None:
                call.random_after.put_back()

    @contextmanager
    def full_pass(self, call: GuidedCall, branch: int) -> Iterator[None]:
        """Do as `transaction` around a whole weak pass, and note which parts run in it, the first time.

        That is not known from a cond pass: when the first one was made, it was not known yet that anything is kept.

        Raises:
            CallError: what the branch would reuse is not known.
        """
        is_counted = self.keeps_state and call.layout not in self._runs
        with self.transaction(call, branch), noting_parts(self._parts if is_counted else {}) as run:
            yield
        if is_counted:
            if not self._switches[branch].was_reached:
                raise self._unknown("does not call the layers to skip in this call")
            self._runs[call.layout] = run

    def suspects(self) -> list[str]:
        """Name what may keep something out of reach: forwards that were replaced, hooks that change values."""
        return [*self.kept.replaced(), *self.kept.hooked()]

    def _unknown(self, what: str = "computes less in this call than in one before") -> CallError:
        replaced = "; ".join(self.kept.replaced()[:2])
        by = f" ({replaced})" if replaced else ""
        return CallError(
            f"{type(self._model).__name__} keeps something from one call to the next and {what}, so it reuses what an "
            f"earlier one has left, and what the weak model would reuse is not known{by}. "
            "Let guidance begin in a step in which everything is computed, or switch this cache off."
        )


@contextmanager
def noting_parts(parts: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Note which of these modules run in this thread within a `with`, by their names."""
    run: set[str] = set()

    def noting(name: str) -> Action:
        def note(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run.add(name)
            return proceed(*args, **kwargs)

        return note

    with ExitStack() as stack:
        patches = [stack.enter_context(patched(module)) for module in parts.values()]
        stack.enter_context(pushed(patches, list(map(noting, parts))))
        yield run


def _parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """List what a step cache may leave out: the model's own parts, entries of lists, attention, and what these call.

    Not what lies inside attention: keys and values of a text may be kept, where the attention itself runs in each step.
    """
    found: dict[str, nn.Module] = {}

    def add(name: str, module: nn.Module) -> None:
        found[name] = module
        if not is_attention(module):
            found.update({f"{name}.{inner}": child for inner, child in module.named_children()})

    for name, module in model.named_modules():
        if not name or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            for inner, child in module.named_children():
                add(f"{name}.{inner}".lstrip("."), child)
        elif is_attention(module):
            add(name, module)
    return found
