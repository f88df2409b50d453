"""Models that make it hard to share work between two passes: each breaks an assumption that sharing could rest on.

All take what the models of the zoo take, and their layers are skipped by name. What a textbook's second pass gives on
them is what any execution has to give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import zoo
from tests.zoo import Block, DiT


class InPlaceBlock(Block):
    """Writes its result into its argument, and returns that."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x.copy_(self.mix(x, text))
        return x


class InPlaceExpressionBlock(Block):
    """Writes into its argument on the way, and returns an expression."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x += self.attn(x)
        x += self.cross(x, text)
        return x + F.gelu(self.ff(x))


class SilentBlock(Block):
    """Writes its result into its argument, and returns nothing."""

    def forward(self, x: Tensor, text: Tensor) -> None:
        x.copy_(self.mix(x, text))


class ViewWritingBlock(Block):
    """Changes one token in its argument on the way, through a view of it."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x[:, :1].mul_(2)
        x = self.mix(x, text)
        return x  # noqa: RET504 - a name, to be read from the source


class SilentDiT(DiT):
    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        block(x, text)
        return x


class SilentOnOwnDiT(SilentDiT):
    """What its blocks write into is not what a module returned."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, text)

    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        if block is self.blocks[0]:
            x = x + 1
        return super().run(block, x, text)


class OldReference(DiT):
    """Looks at an early value, into which a later block has written."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = early = self.blocks[0](self.embed(x), text)
        for block in self.blocks[1:]:
            x = block(x, text)
        return self.out(x) + early


class ParentWrites(DiT):
    """Writes into what blocks return, between them."""

    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        x = block(x, text)
        x += 0.1 * text.mean(1, keepdim=True)
        return x


class LaterWrites(DiT):
    """Keeps an early output, and writes into it at the end."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        early = x = self.blocks[0](self.embed(x), text)
        for block in self.blocks[1:]:
            x = block(x, text)
        early *= 0.5
        return self.out(x) + early


class LongSkips(DiT):
    """U-shaped: later blocks add what earlier ones returned."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, kept = self.embed(x), []
        for i, block in enumerate(self.blocks):
            x = block(x, text)
            if i < len(self.blocks) // 2:
                kept.append(x)
            elif kept:
                x = x + kept.pop()
        return self.out(x)


class Derived(DiT):
    """What is used at the end was computed from an early output, which itself is gone by then."""

    def derive(self, x: Tensor) -> Tensor:
        return x.tanh()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(x), text)
        aside = self.derive(x)
        for block in self.blocks[1:]:
            x = block(x, text)
        return self.out(x) + aside


class DerivedMask(Derived):
    """The same, by way of comparisons, which give a valid result for NaN."""

    def derive(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


class DerivedChoice(Derived):
    """The same, by way of indices."""

    def derive(self, x: Tensor) -> Tensor:
        return x.gather(1, x.argsort(1)[:, :1])


class DerivedWithoutNaN(Derived):
    def derive(self, x: Tensor) -> Tensor:
        return x.nan_to_num()


class DerivedNumber(Derived):
    """The same, by way of a Python number."""

    def derive(self, x: Tensor) -> Tensor:
        return torch.full_like(x[:, :1], x.sum().sign().item())


class Swallowing(DerivedNumber):
    """The same, in code that goes on whatever happens."""

    def derive(self, x: Tensor) -> Tensor:
        try:
            return super().derive(x)
        except Exception:
            return torch.zeros_like(x[:, :1])


class BranchOnValues(DiT):
    """Which blocks run, and how often, depends on values."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        first, *rest, last = self.blocks
        x = first(x, text)
        for block in rest if x[0].sum() > 0 else reversed(rest):
            x = block(x, text)
        return self.out(last(x, text))


class BranchOnRows(BranchOnValues):
    """The same, and it depends on all rows together."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks if len(x) > 2 else [*self.blocks[1:3], self.blocks[0], *self.blocks[3:]]:
            x = block(x, text)
        return self.out(x)


class Recurrent(DiT):
    """Runs its first block a number of times that depends on the call."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        times = 1 + int(self.embed(x)[-1].sum() > 0) + len(x)
        x = self.embed(x)
        for _ in range(times):
            x = self.blocks[0](x, text)
        for block in self.blocks[1:]:
            x = block(x, text)
        return self.out(x)


class HidesErrors(Recurrent):
    """Takes a block that fails for one that is not there."""

    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        try:
            return block(x, text)
        except Exception:
            return x

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks if len(x) > 2 else [self.blocks[1], self.blocks[0], *self.blocks[2:]]:
            x = self.run(block, x, text)
        return self.out(x)


class MemoryBlock(Block):
    def __init__(self, owner: list[Any]) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        before = self.owner[0] if self.owner else 0.0
        x = self.mix(x, text)
        x = x + 0.5 * before
        self.owner[:] = [x]
        return x


def memory() -> nn.Module:
    """Every block adds what the block before it has left behind; the first one starts anew."""
    model, owner = DiT(), []

    class First(MemoryBlock):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            self.owner.clear()
            x = super().forward(x, text)
            return x  # noqa: RET504

    model.blocks = nn.ModuleList([First(owner), *(MemoryBlock(owner) for _ in range(3))])
    return model


class BufferBlock(Block):
    """Leaves a value in a buffer of its own, which the last layer of the model reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        self.seen.add_(1)
        x = self.mix(x, text) * (1 + 0.1 * self.seen)
        return x  # noqa: RET504


class CountingBlock(Block):
    """What it computes depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        self.count += 1
        x = self.mix(x, text) * (1 + 0.1 * self.count)
        return x  # noqa: RET504


class CachingBlock(Block):
    """Computes something once and keeps it: state, but none that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[1])[:, None]
        x = self.mix(x + self.table, text)
        return x  # noqa: RET504


class ListBlock(Block):
    """Leaves a value in a list that it is given."""

    def forward(self, x: Tensor, text: Tensor, found: list[Tensor]) -> Tensor:
        x = self.mix(x, text)
        found.append(x.mean(1, keepdim=True))
        return x


class ListDiT(DiT):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, found = self.embed(x), []
        for block in self.blocks:
            x = block(x, text, found)
        return self.out(x) + sum(found)


class NumberingBlock(Block):
    """Says in a dictionary that it is given which block ran, and on what, as `SpatialTransformer` in ComfyUI does."""

    def forward(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        options["ran"], options["shape"] = options["place"], list(x.shape)
        x = self.mix(x, text)
        return x  # noqa: RET504


class MeasuringBlock(NumberingBlock):
    """What it says is another thing in each call, and for other rows."""

    def forward(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        options["level"] = float(x.mean())
        x = super().forward(x, text, options)
        return x  # noqa: RET504


class Parts(nn.Sequential):
    """Is never called, as `TimestepEmbedSequential` of latent diffusion: the model calls what is in it."""

    def forward(self, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
        return through(self, x, text, options)


def through(parts: Parts, x: Tensor, text: Tensor, options: dict[str, Any]) -> Tensor:
    for part in parts:
        x = part(x, text, options) if isinstance(part, NumberingBlock) else part(x)
    return x


class LatentDiffusion(DiT):
    """A U-Net whose later code reads what its blocks have set."""

    def __init__(self, block: type[Block] = NumberingBlock) -> None:
        super().__init__(block)
        widths = (zoo.DIM, zoo.DIM, 2 * zoo.DIM, 2 * zoo.DIM)
        parts = zip(widths, self.blocks, strict=True)
        self.blocks = nn.ModuleList(Parts(nn.Linear(width, zoo.DIM), block) for width, block in parts)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        x, kept = self.embed(x), []
        for i, parts in enumerate(self.blocks):
            options["place"] = i
            x = through(parts, x if i < 2 else torch.cat([x, kept.pop()], -1), text, options)
            if i < 2:
                kept.append(x)
        return self.out(x) * (1 + options["ran"] + options.get("level", 0)) / options["shape"][-1]


class NoisyBlock(Block):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = F.dropout(self.mix(x, text), 0.3)
        return x  # noqa: RET504


class PassThrough(nn.Module):
    """Returns what it is given, as dropout does in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = zoo.Attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x


class Aliases(DiT):
    """One of two names for one tensor is written to, the other is used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.insert(1, PassThrough())

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        first = self.blocks[0](self.embed(x), text)
        second = self.blocks[1](first, text)
        second += 1.0
        x = first
        for block in self.blocks[2:]:
            x = block(x, text)
        return self.out(x)


class Half(PassThrough):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x[:, :2]


class AliasingViews(Aliases):
    """The same, with a part of the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = Half()


class TwiceBlock(Block):
    """Returns one tensor under two names."""

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = self.mix(x, text)
        return x, x


class Twice(DiT):
    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        one, other = block(x, text)
        one += 1.0
        return other


class Hidden(DiT):
    """A module calls blocks that are not inside it."""

    def __init__(self) -> None:
        super().__init__()
        blocks = list(self.blocks)

        class Caller(PassThrough):
            def forward(self, x: Tensor, text: Tensor) -> Tensor:
                for block in blocks[1:3]:
                    x = block(x, text)
                return x

        self.stages = nn.ModuleList([Caller()])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(x), text)
        x = self.stages[0](x, text)
        return self.out(self.blocks[3](x, text))


class Sometimes(DiT):
    """Does not run all of its blocks in every call."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, active = self.embed(x), self.embed(x)[-1].sum() > 0
        for i, block in enumerate(self.blocks):
            if i != 2 or active:
                x = block(x, text)
        return self.out(x)


class SequenceFirstBlock(Block):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.mix(x.transpose(0, 1), text).transpose(0, 1)
        return x  # noqa: RET504


class SequenceFirst(DiT):
    """Its hidden states are (tokens, rows, channels)."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1), text).transpose(0, 1)


class Conditioned(DiT):
    """What it makes of its text is changed before it is used, and used to the end."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text = F.silu(self.blocks[0](text, text))
        x = self.embed(x)
        for block in self.blocks[1:]:
            x = block(x, text)
        return self.out(x) * text.mean((1, 2), keepdim=True)


class JointPart(nn.Module):
    """The half of a joint block that one stream has: its attention holds projections, and is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Linear(zoo.DIM, zoo.DIM)
        self.attn.qkv = nn.Linear(zoo.DIM, 3 * zoo.DIM)
        self.attn.proj = nn.Linear(zoo.DIM, zoo.DIM)

    def before(self, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        qkv: Tensor = self.attn.qkv(F.layer_norm(x, x.shape[-1:]) * (1 + c[:, None]))
        return qkv.unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)

    def after(self, x: Tensor, attended: Tensor, c: Tensor) -> Tensor:
        x = x + c[:, None] * self.attn.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


def mix_streams(context: Tensor, x: Tensor, text: JointPart, video: JointPart, c: Tensor) -> tuple[Tensor, Tensor]:
    """Let text and video attend to both, text first."""
    pairs = zip(text.before(context, c), video.before(x, c), strict=True)
    attended = F.scaled_dot_product_attention(*(torch.cat(pair, dim=-2) for pair in pairs))
    length = context.shape[1]
    return text.after(context, attended[..., :length, :], c), video.after(x, attended[..., length:, :], c)


class NamelessJointBlock(nn.Module):
    """Has no names for its streams, and attention in a function, as `JointBlock` in SD3.5's own repository."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.video = JointPart(), JointPart()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return mix_streams(*args, text=self.text, video=self.video, **kwargs)


class NamelessJoint(nn.Module):
    """Gives its blocks the text first, without names. Kept in a list where `in_list`."""

    def __init__(self, in_list: bool = False) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(zoo.DIM, zoo.DIM), nn.Linear(zoo.DIM, zoo.DIM)
        self.blocks = nn.ModuleList((ListedJointBlock if in_list else NamelessJointBlock)() for _ in range(3))
        self.in_list = in_list

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        both, c = (text, self.embed(x)), x.mean(1)
        for block in self.blocks:
            both = block(list(both), c=c) if self.in_list else block(*both, c=c)
        return self.out(both[1])


class NamelessText(NamelessJoint):
    """Has no name for its text either, whose channels are not those of its latents."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_y = nn.Linear(2 * zoo.DIM, zoo.DIM)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, self.embed_y(y))


class ListedJointBlock(NamelessJointBlock):
    """The same, with its streams in one list."""

    def forward(self, streams: list[Tensor], c: Tensor) -> list[Tensor]:
        return [*mix_streams(*streams, text=self.text, video=self.video, c=c)]


_INPLACE_ROOTS: dict[str, Callable[[], nn.Module]] = {
    "in_place": lambda: DiT(InPlaceBlock),
    "in_place_old_reference": lambda: OldReference(InPlaceBlock),
    "in_place_expression": lambda: DiT(InPlaceExpressionBlock),
    "silent": lambda: SilentDiT(SilentBlock),
    "silent_on_own": lambda: SilentOnOwnDiT(SilentBlock),
    "writes_through_view": lambda: DiT(ViewWritingBlock),
    "writes_through_view_old_reference": lambda: OldReference(ViewWritingBlock),
    "list": lambda: ListDiT(ListBlock),
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    **_INPLACE_ROOTS,
    "parent_writes": ParentWrites,
    "later_writes": LaterWrites,
    "long_skips": LongSkips,
    "latent_diffusion": LatentDiffusion,
    "latent_diffusion_values": lambda: LatentDiffusion(MeasuringBlock),
    "derived": Derived,
    "derived_mask": DerivedMask,
    "derived_choice": DerivedChoice,
    "derived_without_nan": DerivedWithoutNaN,
    "derived_number": DerivedNumber,
    "swallowing": Swallowing,
    "branch_on_values": BranchOnValues,
    "branch_on_rows": BranchOnRows,
    "recurrent": Recurrent,
    "hides_errors": HidesErrors,
    "memory": memory,
    "caching": lambda: DiT(CachingBlock),
    "aliases": Aliases,
    "aliasing_views": AliasingViews,
    "twice": lambda: Twice(TwiceBlock),
    "hidden": Hidden,
    "sometimes": Sometimes,
    "sequence_first": lambda: SequenceFirst(SequenceFirstBlock),
    "conditioned": Conditioned,
    "fractal": zoo.Fractal,
}
"""What they compute depends on nothing but their arguments."""

CHANGING: dict[str, Callable[[], nn.Module]] = {
    "counting": lambda: DiT(CountingBlock),
    "buffer": lambda: DiT(BufferBlock),
    "noisy": lambda: DiT(NoisyBlock),
}
"""They give another result each time."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {**MODELS, **CHANGING}[name]().eval().requires_grad_(False)
