"""Skip guidance for any diffusion model: bypass layers, guide with the difference, change nothing else."""

import importlib
from typing import TYPE_CHECKING

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
from stg_hooks.modes.modes import LayerCall
from stg_hooks.passes.predict import Predictor
from stg_hooks.skip import check, skip
from stg_hooks.step import Step
from stg_hooks.study import results
from stg_hooks.study.table import layers

__version__ = "0.1.0"


if TYPE_CHECKING:
    from stg_hooks.study.profile import profile
    from stg_hooks.study.report import report
    from stg_hooks.study.sweep import sweep


def __getattr__(name: str) -> object:
    """Load what needs other packages, or much time, when it is first used."""
    if name == "k_diffusion":
        return importlib.import_module("stg_hooks.integrations.k_diffusion")
    if name == "modular":
        return importlib.import_module("stg_hooks.integrations.diffusers.skip_guidance")
    if name == "profile":
        return importlib.import_module("stg_hooks.study.profile").profile
    if name == "report":
        return importlib.import_module("stg_hooks.study.report").report
    if name == "sweep":
        return importlib.import_module("stg_hooks.study.sweep").sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
