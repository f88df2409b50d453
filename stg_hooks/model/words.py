"""The words in the names that code gives to things, where a name is a sign of what a thing is."""

from __future__ import annotations

import functools
import re

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@functools.lru_cache(maxsize=4096)
def words_of(name: str) -> frozenset[str]:
    """Split a name, such as `encoder_hidden_states_2`, `txtIds` or `blocks.0.norm`, into its words, in lower case."""
    return frozenset(word.lower() for word in _WORD.findall(name))


# Arguments of positions belong to tokens, not to rows, even where their number is a multiple of the batch.
_POSITIONAL = words_of("rotary rope freqs ids coords position positions positional")


def is_positional(name: str) -> bool:
    """Tell whether an argument of this name holds positions: one entry per token, not per row."""
    return not _POSITIONAL.isdisjoint(words_of(name))
