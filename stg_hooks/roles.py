"""What one call of a denoiser is for, as its host says it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from stg_hooks.errors import CallError

if TYPE_CHECKING:
    from stg_hooks.guidance.scale_values import Scales
    from stg_hooks.passes.guided_call import WeakCall
    from stg_hooks.passes.rows import SomeRows


_PHRASES = {"cond": "conditional", "uncond": "unconditional", "perturbed": "a weak prediction of its own"}


@dataclasses.dataclass(frozen=True)
class OwnGuidance:
    """A weak prediction that a caller makes by itself unless it is told not to."""

    by: str
    """What makes it, for messages."""
    off: tuple[tuple[str, float], ...]
    """The arguments that switch it off, with their values."""
    isolates: bool = False
    """Whether it isolates streams, as video and audio, instead of skipping layers."""

    @property
    def how_to_switch_off(self) -> str:
        """What to type."""
        return ", ".join(f"{name}={value}" for name, value in self.off)


@dataclasses.dataclass(frozen=True)
class Role:
    """What one call of a denoiser is for."""

    rows: str
    """What its rows are: one label, or several joined by `+` for as many parts of equal size.

    `"cond"` rows are those that weak passes predict; `"uncond"` rows belong to them, the first part to the first. The
    caller combines them, with weights that sum to one, and may do so with further parts: `"image"`, another condition
    left out; and `"perturbed"`, a weak prediction of its own, which may be a call of its own after those that it is
    compared with. `"apart"` rows are left as they are.
    """
    guidance_scale: Scales | None = None
    """The CFG weight that the caller is going to apply, where it is known; a tuple holds one for each prediction."""
    uncond_follows: bool = False
    """It is a cond call whose uncond prediction comes from a call of its own, later in the same step."""
    channels: int | None = None
    """How many channels (dimension 1) of a prediction are guided, where the others are a variance; all, if left out."""
    samples: bool | None = False
    """The denoiser returns a list of single samples, without a dimension for the batch; then rows may
    be `"uncond+cond"` or `"cond+uncond"`, halves of the list. `None` lets the call tell."""
    is_clean: bool = False
    """What the caller combines are clean samples, `x - sigma * prediction` of a flow model."""
    own: tuple[OwnGuidance, ...] = ()
    """The weak predictions that the caller is going to make itself in this step, as it does by default."""
    listed: SomeRows | None = None
    """The cond rows, where the user has listed them: then a call tells what parts it has (`parts.of_call`)."""
    order: tuple[int, ...] | None = None
    """The numbers of the rows, part after part, where the parts do not follow each other."""
    weak_call: WeakCall | None = None
    """Returns the arguments of the cond rows, where the user knows them better."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The labels of its rows."""
        return tuple(self.rows.split("+"))

    @property
    def is_cond(self) -> bool:
        """Whether it has cond rows."""
        return "cond" in self.parts

    @property
    def is_uncond(self) -> bool:
        """Whether it is the uncond call that follows a cond call."""
        return "uncond" in self.parts and not self.is_cond

    @property
    def is_halved(self) -> bool:
        """Whether dimension 0 of the tensors holds `[uncond, cond]`."""
        return self.rows == "uncond+cond" and self.order is None and not self.samples

    @property
    def is_list_of_both(self) -> bool:
        """Whether a list of samples holds cond and uncond ones."""
        return bool(self.samples) and len(self.parts) == 2

    @property
    def is_whole(self) -> bool:
        """Whether rows are not predicted apart: lists of samples, and parts that the denoiser itself tells apart."""
        return bool(self.samples) or ("perturbed" in self.parts and self.is_cond)

    @property
    def has_more(self) -> bool:
        """Whether the caller combines more than one cond and one uncond prediction."""
        return bool({"image", "perturbed"} & {*self.parts}) or self.parts.count("cond") > 1


def check_rows_apart(role: Role, what: str) -> None:
    """Raise where `what` would need cond and uncond rows apart, and a call holds them in another way than in halves.

    Raises:
        CallError: so it is.
    """
    if role.is_list_of_both:
        raise CallError(
            f"{what} cannot be used where cond and uncond are predicted in one list of samples. Leave it out, or use "
            "stg.Guider in a loop of your own."
        )
    if len(role.parts) > 1 and not role.is_halved:
        raise CallError(
            f"{what} cannot be used where the rows of a call are {phrase(role.rows)}, as it needs [uncond, cond]. "
            "Leave it out, or use stg.Guider in a loop of your own."
        )


def phrase(rows: str) -> str:
    """Say in words what rows are."""
    parts = rows.split("+")
    return f"[{', '.join(parts)}]" if len(parts) > 1 else _PHRASES.get(rows, rows)
