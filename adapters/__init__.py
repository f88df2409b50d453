"""Facts about model families that looking at a model cannot tell. Data only."""

from stg_hooks.adapters.blocks import ATTENTION, STREAMS
from stg_hooks.adapters.factorised import TEMPORAL
from stg_hooks.adapters.kin import KIN
from stg_hooks.adapters.published import PUBLISHED

__all__ = ["ATTENTION", "KIN", "PUBLISHED", "STREAMS", "TEMPORAL"]
