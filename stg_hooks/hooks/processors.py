"""Put back what computes attention in some models, where a pipeline has installed something else for a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    pass


_PROCESSOR = "processor"


class Processors:
    """Keeps what computes attention in some models, and puts it back.

    A pipeline may install processors of its own for a run (PAG does), and puts the former ones back at the end of the
    run, which an exception skips.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        """Look at the models; change nothing yet.

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
