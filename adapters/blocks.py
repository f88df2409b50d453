"""What blocks do that neither their source nor one run of them tells. By class name; base classes count."""

STREAMS: dict[str, tuple[str, ...]] = {}
"""Class name of a block to the parameters of its `forward` that stand in for the tensors of its output, in their order.

For blocks of which it cannot be found out which stream leaves as what: `STREAMS["MyBlock"] = ("hidden_states",)`.
"""

ATTENTION: set[str] = set()
"""Class names of attention modules that neither the names of their projections nor their own name gives away."""
