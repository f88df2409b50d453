"""Guide the calls of one denoiser, from within: what `apply` registers on it."""

from __future__ import annotations

import dataclasses
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.errors import CallError, StgWarning
from stg_hooks.guidance.channels import VarianceWatch, guided_part, with_rest
from stg_hooks.guidance.combine import Scale, combine, correction, fitted, is_number, of_sample
from stg_hooks.guidance.reuse import Kept
from stg_hooks.guidance.rules import at_step
from stg_hooks.guidance.samples import are_samples, check_told, takes_samples
from stg_hooks.guidance.schedule import Plan, Settings, known
from stg_hooks.guidance.settings import Branch
from stg_hooks.guidance.trace import Stats, Trace
from stg_hooks.guidance.watch import Watch
from stg_hooks.hooks import activation
from stg_hooks.hooks.compiled import is_compiled, untraced
from stg_hooks.hooks.forward import Patch, Undo, patched, shared
from stg_hooks.hosts import Host, Role, check_rows_apart
from stg_hooks.model.source import parameter_names
from stg_hooks.passes.execution import Execution
from stg_hooks.passes.executions import Executions
from stg_hooks.passes.guided_call import GuidedCall, in_weak_pass, layout_of
from stg_hooks.passes.inputs import Inputs, Written
from stg_hooks.passes.rows import first_batch, halves, own_predictions, replace_predictions, take_rows
from stg_hooks.ranks.link import Ranks
from stg_hooks.ranks.share import Share, check_alone
from stg_hooks.step import Step, check_step


@dataclasses.dataclass(eq=False)
class Session:
    """What the guides of one `apply` share; it knows none of them, so that nothing keeps itself alive."""

    host: Host
    plan: Plan
    every: int = 1
    ranks: Ranks | None = None
    step: Step | None = None
    stats: Stats = dataclasses.field(default_factory=Stats)
    trace: Trace = dataclasses.field(default_factory=Trace)
    watch: Watch = dataclasses.field(default_factory=lambda: Watch("stg.apply"))
    variance: VarianceWatch = dataclasses.field(default_factory=lambda: VarianceWatch(is_told=True))
    models: tuple[nn.Module, ...] = ()
    lost_steps: int = 0
    calls_elsewhere: int = 0
    """Calls that would have been guided, had the `with` been in force where they were made."""

    def role(self, model: nn.Module) -> Role | None:
        """Say what a call of a model is for; `None` if it is not to be guided.

        Raises:
            CallError: with `strict`, the target makes it where the `with` is not in force.
        """
        if activation.is_active(self):
            return self.host.role()
        is_own = self.host.is_calling()
        if is_own is False or any(model in getattr(other, "models", ()) for other in activation.others(self)):
            return None
        self.calls_elsewhere += 1
        if is_own and (self.watch.strict or self.calls_elsewhere == 1):
            text = (
                f"{self.host.name} is called in another thread, task or context than the one in which its stg.apply() "
                f"was entered, so this call is not guided. {activation.ENTER_THERE}"
            )
            if self.watch.strict:
                raise CallError(text)
            warnings.warn(text, StgWarning, stacklevel=3)
        return None


@dataclasses.dataclass
class _Guided:
    """What a cond call has found out: its predictions, and for each of them the weak ones of all branches."""

    step: Step
    settings: Settings
    conds: list[Tensor]
    weaks: list[list[Tensor]]
    samples: bool = False
    """Each prediction is one sample."""

    @property
    def scales(self) -> list[Scale]:
        return [branch.scale for branch in self.settings.active]

    @property
    def replaces(self) -> bool:
        """Whether the final prediction is returned, instead of a term added."""
        return self.settings.replaces

    def guidance_scale(self, role: Role) -> Scale | None:
        """The CFG weight of the step, where it is known."""
        return role.guidance_scale if self.settings.guidance_scale is None else self.settings.guidance_scale

    def trace(self, trace: Trace, terms: Sequence[Tensor], unconds: Sequence[Tensor | None], role: Role) -> None:
        """Add this step to a trace; where CFG is off, nothing points along it."""
        trace.add(self.step, self.scales, terms, self.conds, () if is_number(self.guidance_scale(role), 1) else unconds)

    def terms(self) -> list[Tensor]:
        """What skip guidance adds to each prediction."""
        pairs = zip(self.conds, self.weaks, strict=True)
        return [correction(c, weaks, self._scales_of(i)) for i, (c, weaks) in enumerate(pairs)]

    def weight(self, name: str, value: Scale, i: int) -> Scale:
        """What a weight is for one of the predictions."""
        return of_sample(name, value, i, len(self.conds)) if self.samples else value

    def _scales_of(self, i: int) -> list[Scale]:
        return [self.weight("scale", scale, i) for scale in self.scales]

    def final(self, role: Role, unconds: Sequence[Tensor | None]) -> list[Tensor]:
        """What the caller's own combination has to come to."""
        g = self.guidance_scale(role)
        return [
            combine(
                c,
                weaks,
                u,
                scale=self._scales_of(i),
                guidance_scale=1.0 if g is None else self.weight("guidance_scale", g, i),
                rescale=self.settings.rescale,
                rule=at_step(self.settings.rule, self.step, i),
            )
            for i, (c, weaks, u) in enumerate(zip(self.conds, self.weaks, unconds, strict=True))
        ]


@dataclasses.dataclass
class _Call:
    """One call of the denoiser, as it was made."""

    role: Role
    step: Step
    settings: Settings
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    guided: GuidedCall | None = None
    before: _Guided | None = None  # for an uncond or perturbed call: the cond call before it
    kept: Kept | None = None
    share: Share | None = None
    inputs: Inputs | None = None
    """The arguments as they were made, where more passes are to be made with them."""
    is_guess: bool = False
    """Whether its predictions are samples is not known before they are there."""

    @property
    def is_cond(self) -> bool:
        return self.role.rows in ("cond", "uncond+cond", "cond+uncond")

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Those for which weak predictions are to be computed."""
        return () if self.kept or not self.is_cond else self.settings.active


class _OfThread(threading.local):
    """What one stage of a step leaves for the next: the cond call for its hook, and for the uncond call."""

    call: _Call | None = None
    guided: _Guided | None = None
    last: _Guided | None = None  # the same for perturbed calls, of which there may be several
    kept: Kept | None = None


class _OfModel(threading.local):
    """What sessions that guide the same denoiser must know of each other."""

    unguided: list[Tensor] | None = None


class Guide:
    """Guides the calls of one denoiser."""

    def __init__(self, session: Session, model: nn.Module, execution: str) -> None:
        """Resolve all layers that are known to be skipped; touch nothing.

        Args:
            session: what it shares with the guides of the same pipeline's other denoisers.
            model: the denoiser.
            execution: how weak predictions are computed, as for `apply`.
        """
        self._session = session
        self._model = model
        self._executions = Executions(model, execution, session.stats)
        self._executions.prepare(session.plan.known)
        self._names = parameter_names(model)
        self._written: Written = {}
        self._local = _OfThread()
        self._of_model = _OfModel()
        self._patch: Patch | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Register the hooks, once for all threads that are inside; remove them when the last one leaves."""
        with ExitStack() as stack:
            stack.enter_context(shared(self, "guide", self._install))
            stack.callback(self._forget)
            yield

    def _forget(self) -> None:
        """Let go of what the last call of the thread that leaves has computed."""
        self._local.__dict__.clear()
        self._of_model.unguided = None

    def _forget_all(self) -> None:
        """Let go of what the last calls of all threads have computed: it may be another one that leaves."""
        self._local, self._of_model = _OfThread(), _OfModel()

    def _install(self) -> tuple[None, Undo]:
        with ExitStack() as stack:
            stack.callback(self._forget_all)
            self._of_model = stack.enter_context(shared(self._model, "guided", lambda: (_OfModel(), lambda: None)))
            stack.enter_context(self._executions.installed())
            if is_compiled(self._model):  # there, hooks are compiled as well, and what we wrap is the call itself
                stack.enter_context(stack.enter_context(patched(self._model)).everywhere(self._around_compiled))
                return None, stack.pop_all().close
            self._patch = stack.enter_context(patched(self._model))
            before, after = untraced(self._before), untraced(self._after)
            stack.enter_context(self._patch.everywhere(untraced(self._around)))
            stack.enter_context(self._model.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            stack.enter_context(self._model.register_forward_hook(after, with_kwargs=True))
            return None, stack.pop_all().close

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Find out what a call is for, and keep its arguments as they were made."""
        if in_weak_pass():
            return
        self._local.call = self._of_model.unguided = None
        # A call in another thread may meet a hook while it is registered or removed: PyTorch passes no kwargs then.
        role = None if kwargs is None else self._session.role(model)
        if role is None:
            return
        assert kwargs is not None
        is_guess = role.samples is None
        if is_guess:
            role = dataclasses.replace(role, samples=takes_samples(args, kwargs))
        check_alone(self._session, self._session.ranks, self._model)
        self._executions.caches.check_same()
        self._executions.caches.begin_pass()
        if role.rows in ("uncond", "perturbed"):
            before = self._local.last
            if role.rows == "uncond":
                before, self._local.guided = self._local.guided, None
            settings = Settings(()) if before is None else before.settings
            self._local.call = call = _Call(role, Step(), settings, args, kwargs, before=before)
            if self._session.ranks is not None:
                call.inputs = Inputs(args, kwargs, self._written)
            return
        step = check_step(self._session.step) or self._session.host.step()
        self._local.call = call = _Call(role, step, self._session.plan.at(step), args, kwargs, is_guess=is_guess)
        if self._patch is not None and self._patch.bring_back() and self._session.ranks is None:
            both = role.is_halved  # from the next call on; this one has its forward already
            call.guided = GuidedCall(model, Inputs(args, kwargs, self._written), both)
            call.guided.layout = layout_of(args, kwargs, both)
            call.inputs = call.guided.inputs
        kept = self._local.kept
        if kept is not None and kept.serves(step, call.settings.active, self._session.every):
            call.kept = kept
        if call.inputs is None and (call.branches or self._session.ranks is not None):
            call.inputs = Inputs(args, kwargs, self._written)

    def _around(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that is going to be guided, so that its weak passes can share work with it."""
        call = self._local.call
        if call is None or in_weak_pass():
            return proceed(*args, **kwargs)
        if self._session.ranks is not None:
            check_rows_apart(call.role, "group=")
            both = call.role.is_halved
            call.share = Share(self._session.ranks, self._executions, call.branches, both)
            return call.share.first(proceed, partial(self._arguments, both, args, kwargs))
        if not call.branches:
            return proceed(*args, **kwargs)
        execution = self._executions.of(call.settings.active)
        both = call.role.is_halved
        output, call.guided = execution.cond_pass(proceed, args, kwargs, both, call.inputs)
        return output

    def _around_compiled(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._before(self._model, args, kwargs)
        output = self._around(proceed, args, kwargs)
        guided = self._after(self._model, args, kwargs, output)
        return output if guided is None else guided

    def _after(self, model: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        """Guide what a call has returned."""
        if in_weak_pass():
            return None
        call, self._local.call = self._local.call, None
        if call is None:
            return None
        session, output = self._session, kwargs_and_output[-1]
        session.stats.calls += 1
        start = time.perf_counter()
        unchanged = None
        if call.share is not None:
            unchanged = output = replace_predictions(output, self._together(call, call.share, own_predictions(output)))
        if call.is_cond and not call.settings.changes:
            self._local.last = self._local.guided = _Guided(call.step, call.settings, [], [])
            return unchanged
        now = own_predictions(output)
        if call.is_guess:
            self._find_samples(call, output, now)
        before = self._of_model.unguided
        if before is None:
            self._of_model.unguided = before = now
        if call.role.samples:
            batches = [tensor[None] for tensor in now]
            before, now = (batches if before is now else [tensor[None] for tensor in before]), batches
        new = self._guided(call, before, now) if call.is_cond else self._moved_along(call, now)
        if new is not None and call.is_cond and call.role.channels is not None:  # the others are not guided
            new = [with_rest(n, o, call.role.channels) for n, o in zip(new, now, strict=True)]
        if new is None:
            return unchanged
        session.stats.guided_calls += 1
        session.stats.seconds += time.perf_counter() - start
        if call.role.samples:
            new = [tensor[0] for tensor in new]
        return replace_predictions(output, new)

    def _find_samples(self, call: _Call, output: Any, now: Sequence[Tensor]) -> None:
        """Tell whether predictions are samples, by how they came out, too; put right what was guessed."""
        samples: bool | None = False
        if not isinstance(output, Tensor):
            args, kwargs = (call.args, call.kwargs) if call.inputs is None else call.inputs.again()
            samples = are_samples(now, args, kwargs)
            of_rows = call.role.rows == "uncond+cond" or call.settings.of_samples or call.role.channels is not None
            if samples is None and of_rows:
                check_told(samples, len(now), "guidance")
        if bool(samples) != call.role.samples:
            call.role = dataclasses.replace(call.role, samples=bool(samples))
            if call.share is not None:
                check_rows_apart(call.role, "group=")
            if call.guided is not None and call.share is None:  # nothing that was recorded has the right rows
                call.guided.prefix = call.guided.weaks = call.guided.check = None
                call.guided.batched_cfg = call.role.is_halved
                call.guided.layout = layout_of(call.args, call.kwargs, call.role.is_halved)
        if call.settings.active:
            name = type(self._model).__name__
            self._session.variance.look(name, call.args, call.kwargs, now, bool(call.role.samples))

    def _arguments(
        self, both: bool, args: tuple[Any, ...], kwargs: dict[str, Any], for_uncond: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call for its cond rows, or for its uncond rows."""
        if not both:
            return args, kwargs
        batch = first_batch(args, kwargs)
        if batch is None or batch % 2:
            raise CallError(f"a call with {batch or 'no'} rows cannot be [uncond, cond], so it cannot be spread.")
        rows = slice(0, batch // 2) if for_uncond else slice(batch // 2, None)
        return take_rows(args, kwargs, self._names, batch, rows)

    def _together(self, call: _Call, share: Share, first: list[Tensor]) -> list[Tensor]:
        """Make the other predictions of a call together with the other ranks; return the call's own ones."""
        settings, role = call.settings, call.role
        said = {
            "step": call.step,
            "rows": role.rows,
            "guidance_scale": (role.guidance_scale, settings.guidance_scale),
            "rescale": settings.rescale,
            "rule": settings.rule,
        }
        assert call.inputs is not None
        inputs, both = call.inputs, role.is_halved
        inputs.compare()

        def arguments(for_uncond: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return self._arguments(both, *inputs.again(), for_uncond)

        weaks = share.rest(self._model, arguments, first, said)
        if call.branches:
            call.guided = GuidedCall(self._model, inputs, False, weaks=weaks)
        if share.unconds is None:
            return share.conds
        return [torch.cat([u, c]) for u, c in zip(share.unconds, share.conds, strict=True)]

    def _guided(self, call: _Call, unguided: Sequence[Tensor], output: Sequence[Tensor]) -> list[Tensor]:
        """Return the guided `output`; `unguided` differs from it where another session came first."""
        role, is_first = call.role, unguided is output
        both = role.is_halved
        unconds: list[Tensor | None] = [None] * len(output)
        conds = list(unguided)
        if both:
            pairs = [halves(tensor) for tensor in unguided]
            unconds, conds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        elif role.is_list_of_both:
            first, second = conds[: len(conds) // 2], conds[len(conds) // 2 :]
            conds, unconds = (first, [*second]) if role.rows == "cond+uncond" else (second, [*first])
            if [c.shape for c in conds] != [u.shape for u in unconds if u is not None]:
                shapes = [tuple(tensor.shape[1:]) for tensor in unguided]
                raise CallError(
                    f"a list of predictions of the shapes {shapes} cannot be [{role.rows.replace('+', ', ')}] samples."
                )
        weaks = self._weaks(call, conds, unconds)
        if role.channels is not None:
            of_mean = partial(guided_part, channels=role.channels)
            conds, output = [*map(of_mean, conds)], [*map(of_mean, output)]
            unconds = [None if u is None else of_mean(u) for u in unconds]
            weaks = [[*map(of_mean, found)] for found in weaks]
        guided = _Guided(call.step, call.settings, conds, weaks, bool(role.samples))
        self._local.last = guided
        if guided.replaces:
            self._check_replaceable(guided, role, is_first)
        if role.uncond_follows:
            if self._local.guided is not None and guided.replaces:
                self._session.lost_steps += 1
            self._local.guided = guided
            if guided.replaces and not is_number(role.guidance_scale, 1):
                return conds  # the final prediction has to wait for uncond
        terms = guided.terms()
        if not role.uncond_follows:
            guided.trace(self._session.trace, terms, unconds, role)
        if guided.replaces:
            final = guided.final(role, unconds)
            if role.is_list_of_both:
                return final + final
            return [torch.cat([tensor, tensor]) for tensor in final] if both else final
        if role.is_list_of_both:
            terms = terms + terms
        return [_add(o, torch.cat([t, t]) if both else t) for o, t in zip(output, terms, strict=True)]

    def _weaks(self, call: _Call, conds: Sequence[Tensor], unconds: Sequence[Tensor | None]) -> list[list[Tensor]]:
        """Return, for each prediction, the weak ones of all branches."""
        watch = self._session.watch
        if not call.settings.active or call.kept is not None:
            watch.look(call.step, conds, unconds)
        if not call.settings.active:
            return [[] for _ in conds]
        if call.kept is not None:
            return call.kept.weaks(conds)
        if call.guided is None:
            raise CallError(
                f"a call of {type(self._model).__name__} that is to be guided did not reach its forward: "
                "something replaced it inside the `with`. Enter stg.apply() last."
            )
        # Weak passes go the whole way, so that other people's hooks see them as they saw the cond pass.
        assert call.inputs is not None
        call.inputs.compare()
        call.guided.denoiser, call.guided.inputs = self._model, call.inputs
        execution = self._executions.of(call.settings.active)
        by_branch = self._by_branch(execution, call, call.guided, conds, unconds)
        switches = execution.switches if call.share is None else call.share.switches
        watch.look(call.step, conds, unconds, switches, by_branch)
        weaks = [list(weaks) for weaks in zip(*by_branch, strict=True)]
        if self._session.every > 1:
            known(call.step.index, f"every={self._session.every} counts steps", "index")
            self._local.kept = Kept.after(conds, weaks, call.settings.active, call.step)
        return weaks

    def _by_branch(
        self,
        execution: Execution,
        call: _Call,
        guided: GuidedCall,
        conds: Sequence[Tensor],
        unconds: Sequence[Tensor | None],
    ) -> list[list[Tensor]]:
        """Return the weak predictions of each branch."""
        if not call.role.samples:
            return execution.weak_predictions(guided, conds)
        # A list of samples is not cut: the weak pass predicts all of them.
        others = [tensor for tensor in unconds if tensor is not None]
        uncond_first = call.role.rows == "uncond+cond"
        samples = [tensor[0] for tensor in ([*others, *conds] if uncond_first else [*conds, *others])]
        found = execution.weak_predictions(guided, samples)
        rows = slice(len(others), None) if uncond_first else slice(len(conds))
        return [[weak[None] for weak in weaks[rows]] for weaks in found]

    def _check_replaceable(self, guided: _Guided, role: Role, first: bool) -> None:
        settings, what, name = guided.settings, guided.settings.why_replaces, self._session.host.name
        if not first:
            raise CallError(
                f"another stg.apply() has guided this call of {type(self._model).__name__} already, so {what} cannot "
                "give the final prediction. Use one stg.apply(branches=[...])."
            )
        cfg = role.rows in ("uncond+cond", "cond+uncond") or role.uncond_follows
        if not cfg and settings.guidance_scale is not None and not is_number(settings.guidance_scale, 1):
            raise CallError(
                f"guidance_scale={settings.guidance_scale}: {name} makes no uncond prediction in this step. "
                "Call it with guidance_scale > 1, so that it does; its own value is not used then."
            )
        needs = role.uncond_follows or (cfg and settings.guidance_scale is None)
        if needs and role.guidance_scale is None:
            raise CallError(
                f"{what} needs the CFG weight of this step, which {name} does not tell before the call. "
                "Use rescale=0.0 and rule='cfg', or stg.Guider in a loop of your own."
            )

    def _moved_along(self, call: _Call, output: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the uncond prediction, or a weak one of the caller's own, that goes with the guided cond prediction.

        With it the caller's own combination comes to the guided prediction, and `cond - perturbed` stays what it was.
        """
        guided, role = call.before, call.role
        if guided is not None and not guided.settings.changes:
            return None
        if guided is not None and role.rows == "uncond":
            self._session.watch.look(guided.step, (), output)
        if guided is None or [c.shape for c in guided.conds] != [o.shape for o in output]:
            if self._session.plan.is_constant and not self._session.plan.base.changes:
                return None
            raise CallError(
                f"{self._session.host.name} made a call for {role.rows} rows without a matching cond call before it, "
                "so the weak prediction of this step is not known. Use stg.Guider in a loop of your own."
            )
        if role.rows == "perturbed":
            if guided.replaces:
                raise CallError(
                    f"{self._session.host.name} adds a guidance of its own in this step, so rescale cannot give the "
                    "final prediction. Switch that guidance off, or use rescale=0.0."
                )
            return [_add(p, term) for p, term in zip(output, guided.terms(), strict=True)]
        terms = guided.terms()
        guided.trace(self._session.trace, terms, output, role)
        if not guided.replaces:
            return [_add(u, term) for u, term in zip(output, terms, strict=True)]
        if is_number(role.guidance_scale, 1):
            return None  # it has no weight, and cond is the final prediction already
        # The caller has cond already and will compute u' + g * (c - u'): choose u' so that this is the final one.
        assert role.guidance_scale is not None
        moved = []
        for i, (final, c) in enumerate(zip(guided.final(role, output), guided.conds, strict=True)):
            g = fitted("guidance_scale", guided.weight("guidance_scale", role.guidance_scale, i), c)
            moved.append(((final.float() - g * c.float()) / (1.0 - g)).to(c.dtype))
        return moved


def _add(prediction: Tensor, term: Tensor) -> Tensor:
    return (prediction.float() + term).to(prediction.dtype)
