"""Lists of samples: denoisers that take and return one tensor per sample, without a dimension for the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from stg_hooks.errors import CallError
from stg_hooks.model.tensors import is_prediction, leaves_of


def are_samples(found: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Tell whether the predictions of a call are single samples, and not several predictions of all rows.

    Samples come out as they went in: in a list of as many. Whether its entries have a dimension for the batch, other
    arguments tell: a timestep with one value per row, or the list of texts that goes with the list of samples.

    Args:
        found: the predictions in what the call returned.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        Whether they are; `None` where it cannot be told.
    """
    lists = [entries for entries in _lists((args, kwargs)) if len(entries) == len(found)]
    dims = [tensor.ndim for tensor in found]
    ours = next((entries for entries in lists if [entry.ndim for entry in entries] == dims), None)
    if ours is None or len(set(dims)) > 1:
        return False
    count, firsts = len(ours), {entry.shape[0] for entry in ours}
    if len(firsts) > 1:
        return True  # a batch has one size
    (first,) = firsts
    inside = {id(entry) for entries in _lists((args, kwargs)) for entry in entries}
    others = [x for x in leaves_of(args, kwargs) if isinstance(x, Tensor) and x.ndim and id(x) not in inside]
    for told in ({x.shape[0] for x in others if x.ndim == 1}, {x.shape[0] for x in others}):
        if (count in told) != (first in told):
            return count in told
    if count == first == 1:
        return False  # the same, either way
    beside = [{entry.shape[0] for entry in entries} for entries in lists if entries is not ours]
    if any(sizes != {first} for sizes in beside):
        return True
    if not beside and count == first and any(x.ndim > 1 and x.shape[0] == first for x in others):
        return False  # texts have their rows in dimension 0, too
    return None


def takes_samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Guess before a call is made whether it is one on a list of samples: its first latents are in a list."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 2:
            return False
        for entries in _lists(value):
            return are_samples(entries, args, kwargs) is True
    return False


def count_of_samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Count the samples of a call that `takes_samples`."""
    return next((len(entries) for entries in _lists((args, kwargs))), None)


def check_told(samples: bool | None, count: int, what: str) -> bool:
    """Raise where it cannot be told whether predictions are samples, which `what` depends on.

    Args:
        samples: what `are_samples` says.
        count: number of predictions.
        what: what needs to know.

    Returns:
        Whether they are.

    Raises:
        CallError: it cannot be told.
    """
    if samples is None:
        raise CallError(
            f"the denoiser takes and returns a list of {count} tensors. {what} needs to know whether each of them is "
            "one sample or holds all rows, and the call does not tell. Pass the timestep as a tensor of one value per "
            "row, (B,), and not as many samples as each of them has channels."
        )
    return samples


def _lists(value: Any) -> Iterator[Sequence[Tensor]]:
    """Find the lists and tuples of tensors that may be samples."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _lists(part)
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(part, Tensor) and is_prediction(part) and part.ndim > 1 for part in value):
            yield value
        else:
            for part in value:
                yield from _lists(part)
