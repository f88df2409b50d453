"""How the command line is read: what a command does not accept, whatever its options, and errors in one line."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import typer
import typer.core

from stg_hooks.cli.failures import USAGE, FailureError, reported

_MAY_BE_EMPTY = ("prompt", "negative_prompt")


class Command(typer.core.TyperCommand):
    """Refuses options that are given twice, empty values and numbers that are not finite."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments and check them.

        Raises:
            FailureError: one of them cannot be meant.
        """
        typed = list(args)
        rest = super().parse_args(ctx, args)  # first: `--help` ends here
        if ctx.resilient_parsing:
            return rest
        values, _, order = self.make_parser(ctx).parse_args(args=typed)
        options: dict[int, Any] = {id(param): param for param in order}
        for key, times in Counter(map(id, order)).items():
            param = options[key]
            if times > 1 and not (param.multiple or param.is_flag):
                raise FailureError(f"{_named(param)} is given {times} times. Give it once.", USAGE)
        for param in options.values():
            name, value = str(param.name), ctx.params.get(str(param.name))
            if name not in _MAY_BE_EMPTY and _is_empty(values.get(name)):
                raise FailureError(f"{_named(param)} is empty. Give it a value, or leave it out.", USAGE)
            if isinstance(value, float) and not math.isfinite(value):
                raise FailureError(f"{_named(param)} {value}: expected a finite number.", USAGE)
        return rest


class Commands(typer.core.TyperGroup):
    """Reports in one line what is wrong with the options, too."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read what comes before the command."""
        with reported():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Read the command's own options, and run it."""
        with reported():
            return super().invoke(ctx)


def _named(param: Any) -> str:
    """Write an option as it is typed, in its long form; an argument as the help shows it."""
    return str(max(param.opts, key=len) if param.param_type_name == "option" else param.metavar or param.name)


def _is_empty(value: object) -> bool:
    return isinstance(value, str) and not value.strip()
