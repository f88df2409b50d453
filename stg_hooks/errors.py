"""Errors and warnings of stg_hooks: typed, raised before anything is touched, saying what to type instead."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import NoReturn


class StgError(Exception):
    """Base class of every error that stg_hooks raises on purpose."""


class LayerError(StgError, LookupError):
    """A requested layer does not exist, is ambiguous, or cannot be skipped in the requested mode."""

    is_unseen = False
    """Whether looking at the model finds no layers, so that one call of it may tell."""


class SettingError(StgError, ValueError):
    """A number or name among the settings cannot be used."""


class TargetError(StgError, TypeError):
    """An object was passed that stg_hooks cannot work with."""


class BlockError(StgError, RuntimeError):
    """A block does something that keeps it from being skipped as asked."""


class CallError(StgError, RuntimeError):
    """A call of the denoiser cannot be guided: its rows or its role (cond, uncond) are unknown."""


class RankError(StgError, RuntimeError):
    """The ranks of a process group do not work together: one has failed, died, or was given something else."""


class ResultsError(StgError, RuntimeError):
    """A folder of results does not exist, or is not what was expected: another sweep's, or damaged."""


class ExtraError(StgError, ImportError):
    """A package is missing that only this part of stg_hooks needs; the message says what to install."""


class NotCopied:
    """Refuses to be copied or pickled: what guides one model has hooks and caches for that very model."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raise.

        Raises:
            TargetError: always.
        """
        name = f"stg.{type(self).__name__}"
        raise TargetError(
            f"a {name} cannot be copied or pickled: it belongs to one model, as it is in this process. Copy the model "
            f"(or pipeline) by itself, and make {name}(...) anew from the copy."
        )


class StgWarning(UserWarning):
    """Guidance did not do what its user most likely expects."""


# Libraries whose code may stand between ours and its user's.
LIBRARIES = ("stg_hooks", "torch", "contextlib", "diffusers", "accelerate", "peft")


def is_of_library(frame: FrameType) -> bool:
    """Tell whether a frame runs code of ours, or of a library that calls us."""
    return str(frame.f_globals.get("__name__")).partition(".")[0] in LIBRARIES


def users_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame, from this one outwards, that runs neither our code nor a library's."""
    while frame is not None and is_of_library(frame):
        frame = frame.f_back
    return frame


def warn(text: str) -> None:
    """Warn at the line of the user's code that led here."""
    frame = users_frame(sys._getframe(1))
    if frame is None:
        warnings.warn(text, StgWarning, stacklevel=2)
    else:
        told = frame.f_globals.setdefault("__warningregistry__", {})
        warnings.warn_explicit(text, StgWarning, frame.f_code.co_filename, frame.f_lineno, registry=told)


def closest(asked: str, existing: Iterable[str]) -> str:
    """Phrase the names nearest to a misspelt one, as the end of an error message.

    Args:
        asked: what the user typed.
        existing: the names that would have been accepted.

    Returns:
        `" Did you mean 'a', 'b'?"`, or an empty string where nothing is near.
    """
    names = list(dict.fromkeys(existing))
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""
