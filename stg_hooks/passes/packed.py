"""Arguments about tokens of all rows that lie one after the other, as attention kernels take rows of any length.

They are known by their values: cumulative lengths `[0, a, a + b, ...]`, one more than there are rows, or sequences in
them; numbers of the tokens that are no padding, among all tokens of all rows; tokens, as many as the lengths come to;
the longest length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_SEQUENCES = (1, 2)  # of a row; the second one may be its padding, as HunyuanVideo's own
_WHOLE = (torch.int32, torch.int64)
NO_ROWS = object()
"""In place of the rows of an argument that has none of this kind."""


class Packed:
    """Cumulative lengths of the rows of a call, and what goes with them."""

    def __init__(self, ends: Tensor, bounds: Sequence[int], batch: int) -> None:
        """Take the cumulative lengths.

        Args:
            ends: as they were given.
            bounds: their values.
            batch: number of rows of the call.
        """
        self._ends = ends
        self._count = (len(bounds) - 1) // batch
        self._bounds = bounds[:: self._count]
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        self._lengths = [lengths[row * self._count :][: self._count] for row in range(batch)]

    def rows_of(self, leaf: Any, rows: Sequence[int]) -> Any:
        """Return what an argument is for some rows of the call, in any order; `NO_ROWS` if it is of another kind."""
        total = self._bounds[-1]
        if leaf is self._ends:
            return leaf.new_tensor([0, *itertools.accumulate(itertools.chain(*(self._lengths[row] for row in rows)))])
        if isinstance(leaf, int) and not isinstance(leaf, bool):
            return max(max(self._lengths[row]) for row in rows) if self._is_longest(leaf) else NO_ROWS
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return NO_ROWS
        if leaf.ndim == 1 and not leaf.is_floating_point() and len(leaf) == total:
            return self._numbers_of(leaf, rows)
        if leaf.ndim > 1 and leaf.shape[0] == total:
            return torch.cat([leaf[self._tokens(row)] for row in rows])
        if leaf.ndim > 2 and leaf.shape[:2] == (1, total):
            return torch.cat([leaf[:, self._tokens(row)] for row in rows], dim=1)
        return NO_ROWS

    @property
    def is_whole(self) -> bool:
        """Whether every row has tokens; those with their padding, all equally many."""
        totals = [end - start for start, end in itertools.pairwise(self._bounds)]
        return min(totals) > 0 and (self._count == 1 or min(totals) == max(totals))

    def _is_longest(self, number: int) -> bool:
        """Tell whether this is the longest length, of rows that are one sequence each."""
        return self._count == 1 and [number] == max(self._lengths)

    def _tokens(self, row: int) -> slice:
        return slice(self._bounds[row], self._bounds[row + 1])

    def _numbers_of(self, numbers: Tensor, rows: Sequence[int]) -> Any:
        """Cut the numbers of tokens, each row of which has equally many with its padding."""
        values = numbers.tolist()
        parts = [values[self._tokens(row)] for row in range(len(self._lengths))]
        for size in (parts[1][0], parts[0][-1] + 1):  # a row begins without padding, or ends without
            if all(row * size <= min(part) and max(part) < (row + 1) * size for row, part in enumerate(parts)):
                moved = [numbers[self._tokens(row)] + (place - row) * size for place, row in enumerate(rows)]
                return torch.cat(moved)
        return NO_ROWS


def packed_in(leaves: Iterable[Any], batch: int) -> list[Packed]:
    """Find the cumulative lengths among the arguments of a call.

    Args:
        leaves: all values in its arguments.
        batch: number of its rows.
    """
    if batch < 2:
        return []
    sizes = [(sequences * batch + 1,) for sequences in _SEQUENCES]
    ends = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.shape in sizes]
    values = [(leaf, leaf.tolist()) for leaf in ends if leaf.dtype in _WHOLE and leaf.device.type != "meta"]
    return [
        packed
        for leaf, bounds in values
        # One token a sequence would be positions rather, 0, 1, 2.
        if bounds[0] == 0 and bounds[-1] >= len(bounds) and bounds == sorted(bounds)
        if (packed := Packed(leaf, bounds, batch)).is_whole
    ]


def packed_rows(found: Iterable[Packed], leaf: Any, rows: Sequence[int]) -> Any:
    """Return what an argument is for some rows of the call; `NO_ROWS` if it does not belong to packed ones."""
    parts = (packed.rows_of(leaf, rows) for packed in found)
    return next((part for part in parts if part is not NO_ROWS), NO_ROWS)
