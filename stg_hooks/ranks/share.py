"""Spread the predictions of one step over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from stg_hooks.errors import CallError
from stg_hooks.guidance.settings import Branch
from stg_hooks.model.tensors import is_prediction
from stg_hooks.modes.switch import Switch
from stg_hooks.passes.execution import Execution
from stg_hooks.passes.guided_call import GuidedCall, weak_pass
from stg_hooks.passes.predict import Predictor
from stg_hooks.passes.returned import own_predictions
from stg_hooks.ranks.link import Ranks
from stg_hooks.ranks.messages import samples_of

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
ArgumentsOf: TypeAlias = Callable[[bool], Arguments]


class Share:
    """One call of a denoiser, whose predictions the ranks make together.

    Its jobs are the cond prediction, the weak ones in the order of their branches, and the uncond prediction where the
    call has one; neighbours go to the same rank, where a weak prediction that comes after cond shares work with it.
    """

    def __init__(
        self,
        ranks: Ranks,
        predictor: Predictor,
        branches: Sequence[Branch],
        has_uncond: bool,
    ) -> None:
        """Find out what this rank has to do.

        Args:
            ranks: the ranks.
            predictor: where this rank finds the layers of its branches; installed.
            branches: one weak prediction each.
            has_uncond: whether there is an uncond prediction to make besides.
        """
        self._ranks = ranks
        self._branches = branches
        self._predictor = predictor
        self._count = 1 + len(branches) + has_uncond
        self._jobs = ranks.jobs(self._count)
        self._weak_jobs = [job for job in self._jobs if 1 <= job <= len(branches)]
        mine = [branches[job - 1] for job in self._weak_jobs]
        self._execution: Execution | None = predictor.of(mine) if mine else None
        self._call: GuidedCall | None = None
        self._said: Mapping[str, object] = {}
        self.conds: list[Tensor] = []
        self.unconds: list[Tensor] | None = None

    @property
    def switches(self) -> list[Switch | None]:
        """The switch of each branch; `None` for those whose layers are skipped on other ranks."""
        own: list[Switch | None] = [None] * len(self._branches)
        for i, job in enumerate(self._weak_jobs):
            assert self._execution is not None
            own[job - 1] = self._execution.switches[i]
        return own

    def first(self, denoiser: Callable[..., Any], arguments: ArgumentsOf) -> Any:
        """Do the first job of this rank.

        Args:
            denoiser: makes the call.
            arguments: gives the arguments of the call for cond (False), or for uncond (True).

        Returns:
            What the denoiser returns.
        """
        with self._ranks.telling():
            self._said = samples_of(*arguments(False))  # now, because on a GPU it waits for what has been launched
            job = self._jobs[0]
            args, kwargs = arguments(self._is_uncond(job))
            if job == 0 and self._execution is not None:
                output, self._call = self._execution.cond_pass(denoiser, args, kwargs)
            elif job in self._weak_jobs:
                output = self._weak(job, denoiser, args, kwargs)
            else:
                output = denoiser(*args, **kwargs)
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if not all(map(is_prediction, tensors)):
                raise CallError(
                    "group=: the denoiser returns a tensor that is not a prediction (its dtype is not floating, or it "
                    "has no dimensions), so it is not known how to put its rows together. Leave group out."
                )
            return output

    def rest(
        self,
        denoiser: Callable[..., Any],
        arguments: ArgumentsOf,
        first: Sequence[Tensor],
        said: Mapping[str, object],
    ) -> list[list[Tensor]]:
        """Do the other jobs of this rank, and exchange predictions with the other ranks.

        Args:
            denoiser: makes further calls.
            arguments: as for `first`.
            first: the predictions of the first job.
            said: what has to be the same on all ranks.

        Returns:
            The weak predictions of each branch; `conds` and `unconds` are set.

        Raises:
            CallError: predictions that cannot be exchanged.
            RankError: the other ranks have failed, or did something else.
        """
        with self._ranks.telling():
            found: dict[int, Sequence[Tensor]] = {self._jobs[0]: first}
            if self._call is not None and self._execution is not None:
                inputs = self._execution.inputs(*arguments(False))
                weaks = self._execution.weak_predictions(self._call, first, denoiser, inputs)
                found.update(zip(self._weak_jobs, weaks, strict=True))
            for job in self._jobs:
                if job in self._weak_jobs and job not in found:
                    found[job] = own_predictions(self._weak(job, denoiser, *arguments(False)))
                elif job not in found:
                    with weak_pass():  # a call of ours, not to be guided
                        found[job] = own_predictions(_called(denoiser, arguments(True)))
            kinds = [[(tuple(t.shape), str(t.dtype)) for t in tensors] for tensors in found.values()]
            if any(kind != kinds[0] for kind in kinds):
                raise CallError(f"the predictions of one step differ in shape: {kinds}. Leave group out.")
            if any(tensor.requires_grad for tensors in found.values() for tensor in tensors):
                raise CallError("group=: gradients cannot go from one rank to another. Call with torch.no_grad().")
            about = {**said, "branches": self._described(), **self._said, "predictions": kinds[0]}
        self._ranks.agree(about)
        self.conds, *weaks = self._ranks.gather(found, self._count)
        self.unconds = weaks.pop() if self._count > 1 + len(self._branches) else None
        return weaks

    def _is_uncond(self, job: int) -> bool:
        return job > len(self._branches)

    def _weak(self, job: int, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._execution is not None
        return self._execution.full.weak_output(self._weak_jobs.index(job), denoiser, args, kwargs)

    def _described(self) -> list[object]:
        if not self._branches:
            return []
        switches = self._predictor.of(self._branches).switches
        return [
            (switch.described(), branch.kind, branch.scale)
            for switch, branch in zip(switches, self._branches, strict=True)
        ]


def _called(denoiser: Callable[..., Any], arguments: Arguments) -> Any:
    return denoiser(*arguments[0], **arguments[1])
