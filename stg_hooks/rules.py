"""The guidance rules, under the name that users know: `stg.rules.apg`."""

from stg_hooks.guidance.apg import AveragedApg, apg
from stg_hooks.guidance.rules import (
    Rule,
    adaptive_scale,
    cfg,
    frequency_decoupled,
    magnitude_aware,
    orthogonal,
    rescaled_terms,
    salient,
    tangential,
    zero_init,
    zero_star,
)

__all__ = [
    "AveragedApg",
    "Rule",
    "adaptive_scale",
    "apg",
    "cfg",
    "frequency_decoupled",
    "magnitude_aware",
    "orthogonal",
    "rescaled_terms",
    "salient",
    "tangential",
    "zero_init",
    "zero_star",
]
