"""Facts about model families that looking at a model cannot tell. Data only."""

from stg_hooks.adapters.attention_functions import ATTENTION_FUNCTIONS
from stg_hooks.adapters.blocks import ATTENTION, STREAMS
from stg_hooks.adapters.factorised import TEMPORAL
from stg_hooks.adapters.kin import KIN
from stg_hooks.adapters.outputs import OUTPUTS
from stg_hooks.adapters.published import PUBLISHED
from stg_hooks.modes.layouts import Layout

__all__ = ["ATTENTION", "ATTENTION_FUNCTIONS", "KIN", "OUTPUTS", "PUBLISHED", "STREAMS", "TEMPORAL", "Layout"]
