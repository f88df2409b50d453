"""The words in the names that code gives to things, where a name is a sign of what a thing is."""

from __future__ import annotations

import re

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def words_of(name: str) -> frozenset[str]:
    """Split a name, such as `encoder_hidden_states_2`, `txtIds` or `blocks.0.norm`, into its words, in lower case."""
    return frozenset(word.lower() for word in _WORD.findall(name))
