"""Skip guidance for any diffusion model: bypass layers, guide with the difference, change nothing else."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.2.0"
_TORCH = (2, 5)  # the oldest that `make test-oldest` runs with

if TYPE_CHECKING:
    from stg_hooks import rules
    from stg_hooks.apply import apply
    from stg_hooks.errors import (
        BlockError,
        CallError,
        ExtraError,
        LayerError,
        RankError,
        ResultsError,
        SettingError,
        StgError,
        StgWarning,
        TargetError,
    )
    from stg_hooks.guidance.combine import combine
    from stg_hooks.guidance.settings import Branch
    from stg_hooks.guider import Guider
    from stg_hooks.modes.perturbation import LayerCall
    from stg_hooks.passes.predict import Predictor
    from stg_hooks.skip import check, skip
    from stg_hooks.step import Step
    from stg_hooks.study import results
    from stg_hooks.study.profile import profile
    from stg_hooks.study.report import report
    from stg_hooks.study.sweep import sweep
    from stg_hooks.study.table import layers

# Where each name lives. It loads when it is first used: `stg-hooks --help` must not wait seconds for torch.
_HOMES = {
    **dict.fromkeys(
        (
            "BlockError", "CallError", "ExtraError", "LayerError", "RankError", "ResultsError", "SettingError",
            "StgError", "StgWarning", "TargetError",
        ),
        "errors",
    ),
    "Branch": "guidance.settings",
    "Guider": "guider",
    "LayerCall": "modes.perturbation",
    "Predictor": "passes.predict",
    "Step": "step",
    "apply": "apply",
    "check": "skip",
    "combine": "guidance.combine",
    "layers": "study.table",
    "profile": "study.profile",
    "report": "study.report",
    "skip": "skip",
    "sweep": "study.sweep",
}  # fmt: skip
_MODULES = {
    "k_diffusion": "integrations.k_diffusion",
    "modular": "integrations.diffusers.skip_guidance",
    "results": "study.results",
    "rules": "rules",
}


class _Package(ModuleType):
    """Keeps the import system from putting the module `stg_hooks.apply` in the place of the class `stg.apply`."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Load what a name stands for when it is first used.

    Raises:
        ImportError: torch is too old.
    """
    if _HOMES.get(name, name in _MODULES) not in ("errors", False):
        _check_torch()
    if name in _HOMES:
        found = getattr(importlib.import_module(f"stg_hooks.{_HOMES[name]}"), name)
    elif name in _MODULES:
        found = importlib.import_module(f"stg_hooks.{_MODULES[name]}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def _check_torch() -> None:
    import torch

    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < _TORCH:
        needed = ".".join(map(str, _TORCH))
        raise ImportError(
            f"stg_hooks {__version__} needs torch >= {needed}; this is {torch.__version__}: "
            f'pip install "torch>={needed}"'
        )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BlockError",
    "Branch",
    "CallError",
    "ExtraError",
    "Guider",
    "LayerCall",
    "LayerError",
    "Predictor",
    "RankError",
    "ResultsError",
    "SettingError",
    "Step",
    "StgError",
    "StgWarning",
    "TargetError",
    "apply",
    "check",
    "combine",
    "layers",
    "profile",
    "report",
    "results",
    "rules",
    "skip",
    "sweep",
]
