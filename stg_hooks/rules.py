"""The guidance rules, under the name that users know: `stg.rules.apg`."""

from stg_hooks.guidance.rules import (
    AveragedApg,
    Rule,
    apg,
    cfg,
    magnitude_aware,
    orthogonal,
    tangential,
    zero_init,
    zero_star,
)

__all__ = ["AveragedApg", "Rule", "apg", "cfg", "magnitude_aware", "orthogonal", "tangential", "zero_init", "zero_star"]
