"""Report what went wrong in one line, with the exit status that tells whose fault it was."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import re
import shlex
import signal
import textwrap
import threading
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import typer

from stg_hooks.errors import LayerError, SettingError, StgError

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_LONGEST = 300  # characters of a message that is not ours
_PACKAGES = "diffusers transformers accelerate ftfy numpy pillow imageio imageio-ffmpeg tqdm matplotlib"

# What the library says of its arguments, in the words of the command line.
_HINTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"stg\.layers\((model|pipe)\)"), "stg-hooks layers MODEL"),
    (re.compile(r"stg\.profile measures"), "stg-hooks profile MODEL --out DIR measures"),
    (re.compile(r", or pass a callable\b"), ""),
    # Layers that this model may not have, with entries of configurations that only programs read.
    (re.compile(r"For others of its class there is .*?: start from these\. "), ""),
)
_LIST = re.compile(r"\b(layers|scales|modes|prompts|seeds)=(\[(?:[^\[\]]|\[[^\[\]]*\])*\]|\([^()]*\))")
_ONE = re.compile(r"\b(mode|scale|rescale|start|stop|guidance_scale|layers|fps)=(?=\S)|\bunknown (mode) (?=')")
_OTHER = re.compile(r"\b(\w+) is (.+?) there and (.+?) here\b")
_WORDS = (
    (re.compile(r"\bnum_inference_steps="), "--steps "),
    (re.compile(r"^(layers|scales|modes|seeds)(?=: )"), r"--\1"),
    (re.compile(r"--guidance_scale"), "--guidance-scale"),
)


class FailureError(Exception):
    """What the user is to read, and the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def reported(*lists: str) -> Iterator[None]:
    """Turn errors into one line on stderr; `STG_HOOKS_DEBUG=1` lets them through with their traceback.

    Args:
        lists: the options that take several values here, such as `"modes"`.

    Raises:
        typer.Exit: with status 1, or 2 where the user has to ask for something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            yield
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, (typer.Exit, typer.Abort)) or type(error).__name__ == "NoArgsIsHelpError":
            raise
        if os.environ.get("STG_HOOKS_DEBUG"):
            raise
        line, status = _explain(error, lists)
        if status == INTERRUPTED and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again, it would print a traceback on the way out
        note(f"stg-hooks: {line}")
        raise typer.Exit(status) from None


def note(text: str) -> None:
    """Print to stderr; stdout is for results."""
    typer.echo(text, err=True)


def _warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if not issubclass(category, (DeprecationWarning, FutureWarning)):  # those are for programmers
        note(f"warning: {message}")


def _explain(error: BaseException, lists: Collection[str]) -> tuple[str, int]:
    text = " ".join(str(error).split())
    if isinstance(error, FailureError):
        return text, error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", INTERRUPTED
    if hasattr(error, "format_message"):  # of typer: an option that does not exist, or a value of another kind
        return _misread(error), USAGE
    if isinstance(error, StgError):
        return _in_its_words(text, lists), USAGE if isinstance(error, (LayerError, SettingError)) else FAILED
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not have been loaded
        return (
            "out of memory on the accelerator. Try --offload model, or --offload layer, or fewer frames.",
            FAILED,
        )
    if isinstance(error, ImportError):
        return f"{text}. For everything that stg-hooks may need: pip install {_PACKAGES}", FAILED
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f": {error.filename}" if error.filename else ""
        return f"no space left on the device{where}. Nothing half-written was kept.", FAILED
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}", FAILED
    return f"{type(error).__name__}: {shortened(str(error))} (STG_HOOKS_DEBUG=1 shows where)", FAILED


def _misread(error: Any) -> str:
    """Phrase what typer says of an option or argument."""
    text = " ".join(str(error.format_message()).split()).rstrip(".")
    # What a value is checked with says how it is read, too: "Input should be a valid number, unable to parse ...".
    text = re.sub(r"Input should be (.*?)(, unable to parse.*)?$", r"expected \1", text)
    context = getattr(error, "ctx", None)
    return f"{text}. For the options: {context.command_path} --help" if context else f"{text}."


def hints(text: str) -> str:
    """Have a message say what to type on the command line, where it says what to call."""
    for pattern, words in _HINTS:
        text = pattern.sub(words, text)
    return text


def _in_its_words(text: str, lists: Collection[str]) -> str:
    def one(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        option = f"--{name}s" if f"{name}s" in lists else f"--{name}"
        return f"{option} " if found[1] else f"unknown {option} "

    text = _OTHER.sub(_compared, text)
    text = _ONE.sub(one, _LIST.sub(_list_as_typed, hints(text)))
    for pattern, words in _WORDS:
        text = pattern.sub(words, text)
    return text


def _compared(found: re.Match[str]) -> str:
    """Write what differs between two sweeps as arguments, one by one."""
    name, there, here = found.groups()
    pairs = [(name, there, here)]
    if name == "settings":
        with contextlib.suppress(ValueError, SyntaxError):
            old, new = ast.literal_eval(there), ast.literal_eval(here)
            pairs = [(key, repr(old.get(key)), repr(new.get(key))) for key in {**old, **new}]
    return "; ".join(f"{key}={was} there and {key}={now} here" for key, was, now in pairs if was != now)


def _list_as_typed(found: re.Match[str]) -> str:
    """Write a list of the library's as it is typed: `layers=[[2], [2, 5]]` as `--layers 2,2+5`."""
    name = found[1]
    try:
        values = list(ast.literal_eval(found[2]))
    except (ValueError, SyntaxError):
        return found[0]
    if name == "prompts":
        return " ".join(f"--prompt {shlex.quote(str(value))}" for value in values)
    if name == "seeds":
        return f"--seeds {len(values)}"
    groups = ["+".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
    is_one_group = name == "layers" and not any(isinstance(value, list) for value in values)
    return f"--{name} {('+' if is_one_group else ',').join(groups)}"


def shortened(text: str) -> str:
    """Keep what a person reads of another package's message, in one line: no tensor's values, no encoder's command."""
    text = re.split(r"\b(?:FFMPEG COMMAND|Parameter containing)\b|\b(?:tensor|array)\(", text, maxsplit=1)[0]
    return textwrap.shorten(text, _LONGEST, placeholder=" ...").rstrip(" :,=")
