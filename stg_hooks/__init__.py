"""Skip guidance for any diffusion model: bypass layers, guide with the difference, change nothing else."""

import importlib

from stg_hooks.apply import apply
from stg_hooks.combine import combine
from stg_hooks.errors import BlockError, CallError, LayerError, SettingError, StgError, StgWarning, TargetError
from stg_hooks.guider import Guider
from stg_hooks.perturb import LayerCall
from stg_hooks.settings import Branch
from stg_hooks.skip import skip
from stg_hooks.step import Step
from stg_hooks.table import layers

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load `stg_hooks.k_diffusion` and `stg_hooks.report` when they are first used."""
    if name == "k_diffusion":
        return importlib.import_module("stg_hooks.integrations.k_diffusion")
    if name == "report":
        return importlib.import_module("stg_hooks.integrations.report").report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BlockError",
    "Branch",
    "CallError",
    "Guider",
    "LayerCall",
    "LayerError",
    "SettingError",
    "Step",
    "StgError",
    "StgWarning",
    "TargetError",
    "apply",
    "combine",
    "layers",
    "skip",
]
