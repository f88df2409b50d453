"""The host of a denoiser on its own: what its user says of its rows, or what a pipeline says that calls it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from stg_hooks.errors import CallError
from stg_hooks.hooks.processors import Processors
from stg_hooks.hosts import Host, calling_pipelines
from stg_hooks.module_calls import ModuleCalls
from stg_hooks.roles import Role, phrase
from stg_hooks.step import Step


class ModuleHost:
    """A denoiser on its own: its rows are what the user says, or else a pipeline that calls it; else all are cond."""

    name = "the module"
    tells_when_it_runs = False

    def __init__(self, module: nn.Module, said: ModuleCalls) -> None:
        """Describe the module's calls.

        Args:
            module: the denoiser.
            said: what its user says of them.
        """
        self._module = module
        self._said = said
        self._caller: tuple[object, Host | None] = None, None
        self._processors: Processors | None = None
        self._role = said.role()
        self.knows_guidance_scale = not said.has_uncond or said.guidance_scale is not None

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
            if self._said.of_rows is None:
                raise
            return self._role
        if caller is None or (found is None and self._said.of_rows is not None):
            return self._role
        if found is None:
            return None
        if self._said.of_rows is not None and (found.rows, found.listed) != (self._role.rows, self._role.listed):
            name, value = self._said.of_rows
            own = f"that the rows of this call are {phrase(self._role.rows)}"
            says = own if self._role.listed is None else "which rows of this call are cond"
            raise CallError(
                f"{name}={value!r} says {says}, but {caller.name}, which makes it, "
                f"predicts {phrase(found.rows)} in it. Pass the pipeline: stg.apply(pipe, ...), or leave {name}= out."
            )
        said = {name: getattr(self._role, name) for name in ("guidance_scale", "channels", "weak_call")}
        changes: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        return dataclasses.replace(found, **changes)

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
        if self._processors is not None and any(calling_pipelines()):
            self._processors.put_back()

    def _calling_host(self) -> Host | None:
        for integration, pipeline in calling_pipelines():
            if self._caller[0] is not pipeline:
                self._caller = pipeline, integration.calling_host(pipeline, self._module)
            return self._caller[1]
        return None
