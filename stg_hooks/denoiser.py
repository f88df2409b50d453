"""Guide the calls of one denoiser, from within: what `apply` registers on it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stg_hooks.answers import Answers
from stg_hooks.errors import CallError
from stg_hooks.guidance.guide import Guided, Noisy, Predictions
from stg_hooks.guidance.samples import takes_samples
from stg_hooks.guidance.settings import Branch, Settings
from stg_hooks.hooks.compiled import is_compiled, untraced
from stg_hooks.hooks.forward import Patch, Undo, installed_once, patched
from stg_hooks.model.source import bound_arguments, parameter_names
from stg_hooks.model.tensors import leaves_of
from stg_hooks.parts import cond_rows, of_call, sides
from stg_hooks.passes.guided_call import GuidedCall, in_weak_pass, layout_of
from stg_hooks.passes.inputs import Inputs, Written
from stg_hooks.passes.predict import Predictor
from stg_hooks.passes.returned import own_predictions, places_of_predictions, replace_predictions
from stg_hooks.passes.rows import Rows, first_batch, take_rows
from stg_hooks.ranks.link import check_alone
from stg_hooks.roles import Role, check_rows_apart
from stg_hooks.session import Session
from stg_hooks.step import Step, check_step

if TYPE_CHECKING:
    from stg_hooks.ranks.share import Share


@dataclasses.dataclass
class _Call:
    """One call of the denoiser, as it was made."""

    role: Role
    step: Step
    settings: Settings
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    passes: GuidedCall | None = None
    """Its cond pass, made, and its weak passes, to be made."""
    cond: Guided | None = None
    """For an uncond or perturbed call: what the cond call before it came to."""
    branches: tuple[Branch, ...] = ()
    """Those for which weak predictions are to be computed."""
    share: Share | None = None
    inputs: Inputs | None = None
    """The arguments as they were made, where more passes are to be made with them."""
    places: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Where its predictions are in what it returned."""
    is_guess: bool = False
    """Whether its predictions are samples is not known before they are there."""

    @property
    def is_cond(self) -> bool:
        return self.role.is_cond

    @property
    def rows(self) -> Rows | None:
        """Those that its weak passes are made with; `None` for all."""
        return cond_rows(self.role, self.args, self.kwargs)


class _OfThread(threading.local):
    """What one stage of a step leaves for the next: the cond call for its hook, and for the uncond call."""

    call: _Call | None = None
    for_uncond: Guided | None = None
    for_perturbed: Guided | None = None  # of which there may be several


class _OfModel(threading.local):
    """What sessions that guide the same denoiser must know of each other."""

    unguided: list[Tensor] | None = None


class GuidedDenoiser:
    """Guides the calls of one denoiser."""

    def __init__(self, session: Session, model: nn.Module, execution: str) -> None:
        """Resolve all layers that are known to be skipped; change nothing yet.

        Args:
            session: what it shares with the guides of the same pipeline's other denoisers.
            model: the denoiser.
            execution: how weak predictions are computed, as for `apply`.
        """
        self._session = session
        self._model = model
        self._guidance = session.guidance.for_another()
        self._answers = Answers(self._guidance, session.host.name, type(model).__name__)
        self._predictor = Predictor(model, (), execution, session.guidance.stats)
        self._predictor.prepare(session.guidance.plan.possible)
        self._names = parameter_names(model)
        self._written: Written = {}
        self._local = _OfThread()
        self._of_model = _OfModel()
        self._patch: Patch | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Register the hooks, once for all threads that are inside; remove them when the last one leaves."""
        with ExitStack() as stack:
            stack.enter_context(installed_once(self, "guide", self._install))
            stack.callback(self._forget)
            yield

    def _forget(self) -> None:
        """Let go of what the last call of the thread that leaves has computed."""
        self._local.__dict__.clear()
        self._guidance.forget()
        self._of_model.unguided = None

    def _forget_all(self) -> None:
        """Let go of what the last calls of all threads have computed: it may be another one that leaves."""
        self._local, self._of_model = _OfThread(), _OfModel()
        self._guidance.forget_all()

    def _install(self) -> tuple[None, Undo]:
        guarded = self._session.guarded
        with ExitStack() as stack:
            stack.callback(self._forget_all)
            self._of_model = stack.enter_context(
                installed_once(self._model, "guided", lambda: (_OfModel(), lambda: None))
            )
            stack.enter_context(self._predictor.installed())
            if is_compiled(self._model):  # there, hooks are compiled as well, and what we wrap is the call itself
                stack.enter_context(
                    stack.enter_context(patched(self._model)).everywhere(guarded(self._around_compiled))
                )
                return None, stack.pop_all().close
            self._patch = stack.enter_context(patched(self._model))
            before, after = untraced(guarded(self._before)), untraced(guarded(self._after))
            stack.enter_context(self._patch.everywhere(untraced(guarded(self._around))))
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
        role = of_call(role, args, kwargs)
        check_alone(self._session, self._session.ranks, self._model)
        begin = self._cond_call if role.is_cond else self._other_call
        self._local.call = call = begin(role, args, kwargs)
        call.is_guess = is_guess and role.is_cond
        if call.inputs is None and (call.branches or self._session.ranks is not None):
            call.inputs = Inputs(args, kwargs, self._written)

    def _other_call(self, role: Role, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Begin an uncond call, or a perturbed one of the caller's, after the cond call that it belongs to."""
        cond = self._local.for_perturbed
        if role.is_uncond:
            cond, self._local.for_uncond = self._local.for_uncond, None
        settings = Settings(()) if cond is None else cond.settings
        self._begin_pass(settings)
        return _Call(role, Step(), settings, args, kwargs, cond=cond)

    def _cond_call(self, role: Role, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Begin a call with cond rows: find its step, and what holds there."""
        step = check_step(self._session.step) or self._session.host.step()
        settings = self._guidance.settings(step)
        self._begin_pass(settings)
        call = _Call(role, step, settings, args, kwargs)
        if self._patch is not None and self._patch.bring_back() and self._session.ranks is None:
            # From the next call on; this one has its forward already.
            call.inputs = Inputs(args, kwargs, self._written)
            call.passes = GuidedCall(self._model, call.inputs, call.rows)
            call.passes.layout = layout_of(args, kwargs, call.rows)
        self._look_at_own(role, settings)
        call.branches = self._guidance.wanted(step, settings)
        return call

    def _begin_pass(self, settings: Settings) -> None:
        """Have step caches take notice of a call."""
        if settings.active:  # else nothing of ours depends on them
            self._predictor.caches.check_same()
        self._predictor.caches.begin_pass()

    def _look_at_own(self, role: Role, settings: Settings) -> None:
        """Look at the weak predictions that the caller makes itself, as it does unless it is told not to.

        Raises:
            CallError: ours are to come to the final prediction; or `strict`.
        """
        if role.own and settings.replaces:
            off = ", ".join(own.how_to_switch_off for own in role.own)
            raise CallError(
                f"{role.own[0].by} adds a guidance of its own in this step, so {settings.why_replaces} cannot give the "
                f"final prediction. Call it with {off}; branches=[stg.Branch(...), ...] have the same guidance here."
            )
        self._session.warn_of_own(role, settings)

    def _around(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that is going to be guided, so that its weak passes can share work with it."""
        call = self._local.call
        if call is None or in_weak_pass():
            return proceed(*args, **kwargs)
        self._predictor.learn(call.branches, proceed, args, kwargs)
        if self._session.ranks is not None:
            check_rows_apart(call.role, "group=")
            both = call.role.is_halved
            from stg_hooks.ranks.share import Share

            call.share = Share(self._session.ranks, self._predictor, call.branches, both)
            return call.share.first(proceed, partial(self._arguments, both, args, kwargs))
        if not call.branches:
            return proceed(*args, **kwargs)
        execution = self._predictor.of(call.branches)
        rows = call.rows
        weak_call = None if rows is None else call.role.weak_call
        output, call.passes = execution.cond_pass(proceed, args, kwargs, rows, call.inputs, weak_call)
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
        stats, output = self._guidance.stats, kwargs_and_output[-1]
        stats.calls += 1
        start = time.perf_counter()
        unchanged = None
        if call.share is not None:
            unchanged = output = replace_predictions(
                output, self._with_ranks(call, call.share, own_predictions(output))
            )
        if call.is_cond and not call.settings.changes:
            self._local.for_perturbed = self._local.for_uncond = Guided(call.step, call.settings, (), [], [])
            return unchanged
        now, call.places = own_predictions(output), places_of_predictions(output)
        if call.is_guess:
            self._find_samples(call, output, now)
        before = self._of_model.unguided
        if before is None:
            self._of_model.unguided = before = now
        new = self._guided(call, before, now) if call.is_cond else self._other(call, now)
        if new is None:
            return unchanged
        stats.guided_calls += 1
        stats.seconds += time.perf_counter() - start
        return replace_predictions(output, new)

    def _find_samples(self, call: _Call, output: Any, now: Sequence[Tensor]) -> None:
        """Tell from the output, too, whether each prediction is one sample, and correct the earlier guess."""
        role = call.role
        arguments = (call.args, call.kwargs) if call.inputs is None else call.inputs.again()
        of_rows = len(role.parts) > 1 or role.channels is not None
        samples = self._guidance.are_samples(output, now, arguments, call.settings, of_rows)
        if samples != role.samples:
            call.role = of_call(dataclasses.replace(role, samples=samples), *arguments)
            if call.share is not None:
                check_rows_apart(call.role, "group=")
            if call.passes is not None and call.share is None:  # nothing that was recorded has the right rows
                call.passes.prefix = call.passes.weaks = call.passes.check = None
                call.passes.rows = call.rows
                call.passes.layout = layout_of(call.args, call.kwargs, call.rows)
        if call.settings.active:
            self._guidance.variance.look(type(self._model).__name__, call.args, call.kwargs, now, samples)

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

    def _with_ranks(self, call: _Call, share: Share, first: list[Tensor]) -> list[Tensor]:
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
            call.passes = GuidedCall(self._model, inputs, None, weaks=weaks)
        if share.unconds is None:
            return share.conds
        return [torch.cat([u, c]) for u, c in zip(share.unconds, share.conds, strict=True)]

    def _guided(self, call: _Call, unguided: Sequence[Tensor], output: Sequence[Tensor]) -> list[Tensor]:
        """Return the guided `output`; `unguided` differs from it where another session came first."""
        role = call.role
        conds, unconds = sides(role, unguided)
        predictions = self._weaks(call, unguided, conds, unconds) if call.branches else Predictions(conds, unconds)
        predictions.places = call.places
        guided = self._guidance.guided(call.step, call.settings, predictions, role.channels, bool(role.samples))
        self._local.for_perturbed = guided
        if guided.settings.replaces and role.is_clean:
            guided.noisy = self._noisy(call, unguided)
        answer = self._answers.to_cond(role, guided, unguided, unconds, output)
        if role.uncond_follows:
            if self._local.for_uncond is not None and guided.settings.replaces:
                self._session.lost_steps += 1
            self._local.for_uncond = guided
        return answer

    def _other(self, call: _Call, output: Sequence[Tensor]) -> list[Tensor] | None:
        """Return what goes with the guided cond prediction, for an uncond call or a perturbed one of the caller's."""
        return self._answers.to_other(call.role, call.cond, output)

    def _weaks(
        self, call: _Call, unguided: Sequence[Tensor], conds: Sequence[Tensor], unconds: Sequence[Tensor | None]
    ) -> Predictions:
        """Make the weak predictions of a call."""
        if call.passes is None:
            raise CallError(
                f"a call of {type(self._model).__name__} that is to be guided did not reach its forward: "
                "something replaced it inside the `with`. Enter stg.apply() last."
            )
        # Weak passes go the whole way, so that other people's hooks see them as they saw the cond pass.
        assert call.inputs is not None
        call.inputs.compare()
        execution = self._predictor.of(call.branches)
        found = Predictions(conds, unconds)
        found.switches = execution.switches if call.share is None else call.share.switches
        if not call.role.is_whole:
            found.weaks = execution.weak_predictions(call.passes, conds, self._model, call.inputs)
            found.unskipped = [call.passes.unskipped.get(branch) for branch in range(len(found.weaks))]
            return found
        # Rows that are not predicted apart are not cut: the weak pass predicts all of them.
        weaks = execution.weak_predictions(call.passes, unguided, self._model, call.inputs)
        found.weaks = [sides(call.role, of_branch)[0] for of_branch in weaks]
        return found

    def _noisy(self, call: _Call, predictions: Sequence[Tensor]) -> Noisy:
        """Find what the predictions of a call were made for: its caller combines clean samples.

        Raises:
            CallError: the call does not tell.
        """
        args, kwargs = (call.args, call.kwargs) if call.inputs is None else call.inputs.again()
        given = [x for x in leaves_of((), bound_arguments(self._model, args, kwargs)) if isinstance(x, Tensor)]
        latents: list[Tensor] = []
        for prediction in predictions:
            fits = [x for x in given if x.shape == prediction.shape and not any(x is other for other in latents)]
            latents += fits[:1]
        level = call.step.sigma
        if len(latents) < len(predictions) or level is None or call.step.kind not in (None, "flow"):
            raise CallError(
                f"{self._session.host.name} combines clean samples, and this call does not tell of what noise: so "
                f"{call.settings.why_replaces} cannot give the final prediction. Use rescale=0.0 and rule='cfg'."
            )
        return Noisy(sides(call.role, latents)[0], level)
