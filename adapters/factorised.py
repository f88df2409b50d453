"""Which attention works across frames, in models of which neither names nor class names tell.

Class name of the model to parts of the dotted names of its temporal attention modules.
"""

TEMPORAL: dict[str, tuple[str, ...]] = {}
