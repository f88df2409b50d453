"""What `apply` needs to know about the target that it guides, and which integration describes which kind of target."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import operator
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from stg_hooks.errors import CallError, TargetError
from stg_hooks.step import Step

if TYPE_CHECKING:
    from stg_hooks.guidance.combine import Scales

# Top-level package of a target's class -> module with a `host(target)` function; imported when first needed. It may
# also have `calling_pipeline()` and `calling_host(pipeline, module)`, which tell what calls a guided module, and
# `plain_attention(attention)`, which has its attention computed where it can be seen.
_INTEGRATIONS = {"diffusers": "stg_hooks.integrations.diffusers.host"}
# Top-level package of an attention module's class -> module with a `plain_attention(attention)` function.
_ATTENTION = {**_INTEGRATIONS, "comfy": "stg_hooks.integrations.comfyui.attention"}
# What a host leaves on modules -> module with a `step_caches(modules)` function.
_MARKS = {"_diffusers_hook": "stg_hooks.integrations.diffusers.caches"}


_PHRASES = {"cond": "conditional", "uncond": "unconditional", "perturbed": "a weak prediction of its own"}


@dataclasses.dataclass(frozen=True)
class OwnGuidance:
    """A weak prediction that a caller makes by itself unless it is told not to."""

    by: str
    """What makes it, for messages."""
    off: tuple[tuple[str, float], ...]
    """The arguments that switch it off, with their values."""
    isolates: bool = False
    """Whether it isolates streams, as video and audio, instead of skipping layers."""

    @property
    def how_to_switch_off(self) -> str:
        """What to type."""
        return ", ".join(f"{name}={value}" for name, value in self.off)


@dataclasses.dataclass(frozen=True)
class Role:
    """What one call of a denoiser is for.

    `rows` says what its rows are: one label, or several joined by `+` for as many parts of equal size. `"cond"` rows
    are those that weak passes predict; `"uncond"` rows belong to them, the first part to the first. The caller combines
    them, with weights that sum to one, and may do so with further parts: `"image"`, another condition left out; and
    `"perturbed"`, a weak prediction of its own, which may be a call of its own after those that it is compared with.
    `"apart"` rows are left as they are.

    `guidance_scale` is the CFG weight that the caller is going to apply, where it is known; a tuple holds one for each
    prediction of a call. `uncond_follows` marks a
    cond call whose uncond prediction comes from a call of its own, later in the same step. `channels` says how many
    channels (dimension 1) of a prediction are guided, where the others predict something else, a variance; all, if left
    out. With `samples`, the denoiser returns its predictions as a list of single samples, without a dimension for the
    batch; then rows may be `"uncond+cond"` or `"cond+uncond"`: halves of the list. `None` lets the call tell.

    `is_clean` says that what the caller combines are clean samples, `x - sigma * prediction` of a flow model, and `own`
    which weak predictions it is going to make itself in this step because that is its default.
    """

    rows: str
    guidance_scale: Scales | None = None
    uncond_follows: bool = False
    channels: int | None = None
    samples: bool | None = False
    is_clean: bool = False
    own: tuple[OwnGuidance, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The labels of its rows."""
        return tuple(self.rows.split("+"))

    @property
    def is_cond(self) -> bool:
        """Whether it has cond rows."""
        return "cond" in self.parts

    @property
    def is_uncond(self) -> bool:
        """Whether it is the uncond call that follows a cond call."""
        return "uncond" in self.parts and not self.is_cond

    @property
    def is_halved(self) -> bool:
        """Whether dimension 0 of the tensors holds `[uncond, cond]`."""
        return self.rows == "uncond+cond" and not self.samples

    @property
    def is_list_of_both(self) -> bool:
        """Whether a list of samples holds cond and uncond ones."""
        return bool(self.samples) and len(self.parts) == 2

    @property
    def is_whole(self) -> bool:
        """Whether rows are not predicted apart: lists of samples, and parts that the denoiser itself tells apart."""
        return bool(self.samples) or ("perturbed" in self.parts and self.is_cond)

    @property
    def has_more(self) -> bool:
        """Whether the caller combines more than one cond and one uncond prediction."""
        return bool({"image", "perturbed"} & {*self.parts}) or self.parts.count("cond") > 1


def check_rows_apart(role: Role, what: str) -> None:
    """Raise where `what` would need cond and uncond rows apart, and a call holds them in another way than in halves.

    Raises:
        CallError: so it is.
    """
    if role.is_list_of_both:
        raise CallError(
            f"{what} cannot be used where cond and uncond are predicted in one list of samples. Leave it out, or use "
            "stg.Guider in a loop of your own."
        )
    if len(role.parts) > 1 and not role.is_halved:
        raise CallError(
            f"{what} cannot be used where the rows of a call are {phrase(role.rows)}, as it needs [uncond, cond]. "
            "Leave it out, or use stg.Guider in a loop of your own."
        )


def phrase(rows: str) -> str:
    """Say in words what rows are."""
    parts = rows.split("+")
    return f"[{', '.join(parts)}]" if len(parts) > 1 else _PHRASES[rows]


_PROCESSOR = "processor"


class Processors:
    """Keeps what computes attention in some models, and puts it back.

    A pipeline may install processors of its own for a run (PAG does), and puts the former ones back at the end of the
    run, which an exception skips.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        """Look at the models; touch nothing.

        Args:
            models: all their modules are looked at.
        """
        self._models = models
        self._found: list[tuple[nn.Module, Any]] = []
        self.note()

    def note(self) -> None:
        """Keep those that are installed now."""
        modules = (module for model in self._models for module in model.modules())
        self._found = [(module, getattr(module, _PROCESSOR)) for module in modules if hasattr(module, _PROCESSOR)]

    def put_back(self) -> None:
        """Install those again that were noted."""
        for module, processor in self._found:
            if getattr(module, _PROCESSOR, None) is not processor:
                module._modules.pop(_PROCESSOR, None)  # torch assigns only modules over a module
                setattr(module, _PROCESSOR, processor)


class Host(Protocol):
    """Answers for one target."""

    @property
    def name(self) -> str:
        """What to call the target in messages."""

    @property
    def knows_guidance_scale(self) -> bool:
        """Whether roles carry a CFG weight, which `rescale` needs."""

    @property
    def tells_when_it_runs(self) -> bool:
        """Whether `watched` looks before each call; otherwise it is up to the end of the `with`."""

    def denoisers(self) -> dict[str, nn.Module]:
        """Return the modules to guide, by the names that the target has for them."""

    def is_calling(self) -> bool | None:
        """Tell whether the call that is being made is the target's own; `None` where anyone may make such calls."""

    def role(self) -> Role | None:
        """Say what the call that is being made is for; `None` if it is not the target's, or none to guide."""

    def step(self) -> Step:
        """Say where in a run the call is made."""

    def check_same(self) -> None:
        """Raise a CallError where the target does not use the denoisers any more that it had."""

    def watched(self) -> AbstractContextManager[None]:
        """Check, within a `with`, for replaced denoisers when the target runs next."""

    def put_back(self) -> None:
        """Undo what the target's run has changed of its denoisers, as an exception of ours is going to end it."""


class StepCaches(Protocol):
    """What a host has a model keep from one step to the next, so that less has to be computed."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def hooks(self) -> Sequence[object]:
        """What it consists of."""

    def begin_pass(self) -> None:
        """Take notice of a pass that is not a weak one, before it is made."""

    def apart(self, key: object, perturbed: Collection[nn.Module], bypassed: bool) -> AbstractContextManager[object]:
        """Keep calls of the model that go with `key` away from what the other passes keep."""


class ModuleHost:
    """A denoiser on its own: its rows are what the user says, or else a pipeline that calls it; else all are cond."""

    name = "the module"
    tells_when_it_runs = False

    def __init__(
        self,
        module: nn.Module,
        batched_cfg: bool | None,
        guidance_scale: Scales | None,
        channels: int | None = None,
    ) -> None:
        """Describe the module's calls.

        Args:
            module: the denoiser.
            batched_cfg: whether its rows are `[uncond, cond]`, or every row is conditional; `None` if nothing was said.
            guidance_scale: the CFG weight that its caller applies, if known.
            channels: number of channels that are guided; all, if left out.
        """
        self._module = module
        self._said = batched_cfg
        self._caller: tuple[object, Host | None] = None, None
        self._processors: Processors | None = None
        self._role = Role("uncond+cond" if batched_cfg else "cond", guidance_scale, channels=channels, samples=None)
        self.knows_guidance_scale = not batched_cfg or guidance_scale is not None

    def denoisers(self) -> dict[str, nn.Module]:
        """Return the module under an empty name."""
        return {"": self._module}

    def is_calling(self) -> None:
        """Leave it open: other threads may use the plain module."""

    def role(self) -> Role | None:
        """Return what was said, or what a pipeline says that makes the call.

        Raises:
            CallError: it says something else.
        """
        caller = self._calling_host()
        try:
            found = None if caller is None else caller.role()
        except CallError:  # the pipeline's code does not tell, which is why its user has said it
            if self._said is None:
                raise
            return self._role
        if caller is None or (found is None and self._said is not None):
            return self._role
        if found is None or self._said is None:
            said = {"guidance_scale": self._role.guidance_scale, "channels": self._role.channels}
            changes: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
            return found if found is None else dataclasses.replace(found, **changes)
        if found.rows != self._role.rows:
            raise CallError(
                f"batched_cfg={self._said} says that the rows of this call are {phrase(self._role.rows)}, but "
                f"{caller.name}, which makes it, predicts {phrase(found.rows)} in it. Pass the pipeline: "
                "stg.apply(pipe, ...), or leave batched_cfg= out."
            )
        return self._role

    def step(self) -> Step:
        """Return what a pipeline says that makes the call; otherwise nothing is known."""
        caller = self._calling_host()
        return Step() if caller is None else caller.step()

    def check_same(self) -> None:
        """Do nothing: which module is called is up to the caller."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the attention processors."""
        self._processors = Processors([self._module])
        yield

    def put_back(self) -> None:
        """Put the attention processors back if a pipeline makes the call; what others set is theirs."""
        if self._processors is not None and any(self._calling()):
            self._processors.put_back()

    def _calling_host(self) -> Host | None:
        for integration, pipeline in self._calling():
            if self._caller[0] is not pipeline:
                self._caller = pipeline, integration.calling_host(pipeline, self._module)
            return self._caller[1]
        return None

    def _calling(self) -> Iterator[tuple[Any, object]]:
        """Find the pipeline that makes a call, and the integration that knows it."""
        for library, name in _INTEGRATIONS.items():
            if library not in sys.modules:
                continue
            integration = sys.modules.get(name) or importlib.import_module(name)  # the latter takes its time
            calling = getattr(integration, "calling_pipeline", None)
            pipeline = None if calling is None else calling()
            if pipeline is not None:
                yield integration, pipeline


def pipeline_host(target: object) -> Host:
    """Find the host of a pipeline.

    Args:
        target: an object of a class that belongs to a known host library, or derives from one that does.

    Returns:
        Its host.

    Raises:
        TargetError: no integration knows this kind of object.
    """
    for cls in type(target).__mro__:
        module = _INTEGRATIONS.get(cls.__module__.partition(".")[0])
        if module is not None:
            host: Host = importlib.import_module(module).host(target)
            return host
    raise TargetError(
        f"cannot guide a {type(target).__name__}: expected a diffusers pipeline or a torch.nn.Module. For a denoiser "
        "that is a plain function, use stg.Guider(function, model=module, ...)."
    )


def plain_attention(attention: nn.Module) -> AbstractContextManager[object]:
    """Have an attention module compute with torch's own `scaled_dot_product_attention` within a `with`."""
    for cls in type(attention).__mro__:
        module = _ATTENTION.get(cls.__module__.partition(".")[0])
        plain = getattr(importlib.import_module(module), "plain_attention", None) if module is not None else None
        if plain is not None:
            context: AbstractContextManager[object] = plain(attention)
            return context
    return nullcontext()


def step_caches(modules: Sequence[nn.Module]) -> StepCaches | None:
    """Find the step caches of a model.

    Args:
        modules: the model and all modules in it.

    Raises:
        TargetError: one that cannot be used together with skip guidance.
    """
    for mark, name in _MARKS.items():
        if any(map(operator.contains, map(vars, modules), itertools.repeat(mark))):
            found: StepCaches | None = importlib.import_module(name).step_caches(modules)
            return found
    return None


def denoisers_of(target: object) -> dict[str, nn.Module]:
    """Return the denoisers of a module (itself, under an empty name) or of a pipeline."""
    return {"": target} if isinstance(target, nn.Module) else pipeline_host(target).denoisers()
