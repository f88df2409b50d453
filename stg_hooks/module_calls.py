"""What a user says of the calls of a module, which nothing else tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from stg_hooks.errors import SettingError
from stg_hooks.guidance.scale_values import check_scales
from stg_hooks.roles import Role

if TYPE_CHECKING:
    from stg_hooks.guidance.scale_values import Scales
    from stg_hooks.passes.guided_call import WeakCall
    from stg_hooks.passes.rows import SomeRows

_LABELS = ("cond", "uncond", "image", "apart")


@dataclasses.dataclass(frozen=True)
class ModuleCalls:
    """What the user of a module says of its calls, as the arguments of `apply`."""

    batched_cfg: bool | None = None
    rows: str | SomeRows | None = None
    weak_call: WeakCall | None = None
    guidance_scale: Scales | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        """Raise where it cannot be.

        Raises:
            SettingError: rows said twice, or in no way that is known; or `weak_call` without rows.
        """
        if self.guidance_scale is not None:
            check_scales("guidance_scale", self.guidance_scale)
        if self.batched_cfg is not None and self.rows is not None:
            raise SettingError(
                f"batched_cfg={self.batched_cfg} and rows={self.rows!r} both say which rows are cond: leave one out."
            )
        if self.weak_call is not None and not self.has_uncond:
            raise SettingError(
                "weak_call= returns the arguments of the cond rows, so it needs to be said which ones these are: pass "
                "rows=, or batched_cfg=True."
            )
        if isinstance(self.rows, str):
            parts = self.rows.split("+")
            if "cond" not in parts or not {*parts} <= {*_LABELS}:
                raise SettingError(
                    f"rows={self.rows!r}: expected the parts of a call in their order, as in 'cond+uncond', of "
                    f"{', '.join(map(repr, _LABELS))}; or the cond rows as a slice, a list of numbers, or a mask."
                )
        elif not isinstance(self.rows, (slice, Sequence, Tensor, type(None))):
            raise SettingError(
                f"rows={self.rows!r}: expected a slice, a list of row numbers, a mask of one bool per row, or the "
                "parts of a call as in 'cond+uncond'."
            )

    @property
    def has_uncond(self) -> bool:
        """Whether there may be other rows than cond ones."""
        said = self.rows is not None and not (isinstance(self.rows, str) and self.rows == "cond")
        return said or bool(self.batched_cfg)

    @property
    def of_rows(self) -> tuple[str, object] | None:
        """What says which rows are cond, and how; `None` if nothing does."""
        said = (("batched_cfg", self.batched_cfg), ("rows", self.rows))
        return next(((name, value) for name, value in said if value is not None), None)

    @property
    def _listed(self) -> SomeRows | None:
        rows = None if isinstance(self.rows, str) else self.rows
        return rows.tolist() if isinstance(rows, Tensor) else rows

    def role(self) -> Role:
        """Return what it says of each call."""
        named = self.rows if isinstance(self.rows, str) else None
        return Role(
            named or ("cond" if not self.has_uncond else "uncond+cond" if self.batched_cfg else "cond+uncond"),
            self.guidance_scale,
            channels=self.channels,
            samples=None,
            listed=self._listed,
            weak_call=self.weak_call,
        )
