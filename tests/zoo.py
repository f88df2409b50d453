"""Tiny models for the tests: awkward modules written by hand, and small random configurations of diffusers' families.

Every block class of the zoo names, as `identity`, a module written by hand that returns what the block would if every
stream left it as it entered. `without(model, names)` puts those in place of blocks: the oracle for a residual skip.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import queue
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg
from stg_hooks.hooks.forward import _is_ours
from stg_hooks.modes.modes import MODES
from tests.tiny_models import MODELS, HandThrough, Tiny, expand

DIM, TEXT_TOKENS, TOKENS = 8, 3, 5
ALL_MODES = [name for name, mode in MODES.items() if mode.needs != "streams"]
"""Those that models of one stream can have."""
EXECUTIONS = ("auto", "sequential", "batched", "full")
ATTENTION_MODES = [name for name, mode in MODES.items() if mode.needs == "attention"]
OTHER_MODES = [name for name in ALL_MODES if name != "residual"]
"""Those that compute the layer, changed."""


# --- identities -------------------------------------------------------------------------------------------------------


class Keep(nn.Module):
    """Returns its first argument."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return x


class KeepImageText(nn.Module):
    """Takes (image, text), returns (image, text)."""

    def forward(self, image: Tensor, text: Tensor, *args: Any, **kwargs: Any) -> Any:
        return image, text


class KeepTextImage(nn.Module):
    """Takes (image, text), returns (text, image)."""

    def forward(self, image: Tensor, text: Tensor, *args: Any, **kwargs: Any) -> Any:
        return text, image


class KeepHidden(nn.Module):
    """Takes keywords only."""

    def forward(self, *, hidden: Tensor, **kwargs: Any) -> Any:
        return hidden


class KeepWithNones(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return None, x, None


class KeepDict(nn.Module):
    def forward(self, x: Tensor, text: Tensor) -> Any:
        return OrderedDict(hidden=x, note="fine", rest=[None, text])


# --- blocks -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention, or cross-attention where a context is given; known by its projections only."""

    def __init__(self, dim: int = DIM, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            project(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, t in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One stream, read from the `return` statement."""

    identity: type[nn.Module] = Keep

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross, self.ff = Attention(), Attention(), nn.Linear(DIM, DIM)

    def mix(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(x)
        x = x + self.cross(x, text)
        return x + F.gelu(self.ff(x))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.mix(x, text)
        return x  # noqa: RET504 - a name, to be read from the source


class ExpressionBlock(Block):
    """Returns an expression: what it returns has to be learnt from one real output."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.mix(x, text)


class TwoReturnsBlock(Block):
    """Two different `return` statements: the source does not tell which one is taken."""

    def forward(self, x: Tensor, text: Tensor, as_tuple: bool = False) -> Any:
        x = self.mix(x, text)
        if as_tuple:
            return (x,)
        return x


class KeywordBlock(Block):
    identity = KeepHidden

    def forward(self, *, hidden: Tensor, text: Tensor, gain: float = 1.0) -> Tensor:
        hidden = gain * self.mix(hidden, text)
        return hidden  # noqa: RET504 - a name, to be read from the source


class NonesBlock(Block):
    identity = KeepWithNones

    def forward(self, x: Tensor, text: Tensor) -> tuple[None, Tensor, None]:
        x = self.mix(x, text)
        return None, x, None


class ComputedNonesBlock(Block):
    """The same output, not to be read from the source."""

    identity = KeepWithNones

    def forward(self, x: Tensor, text: Tensor) -> tuple[None, Tensor, None]:
        return None, self.mix(x, text), None


class DictBlock(Block):
    """A nested, dict-like output with a constant and a None in it."""

    identity = KeepDict

    def forward(self, x: Tensor, text: Tensor) -> OrderedDict[str, Any]:
        return OrderedDict(hidden=self.mix(x, text), note="fine", rest=[None, text * 2])


class TwoStreamBlock(nn.Module):
    """Joint attention over image and text; subclasses say which stream is returned first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Attention(), nn.Linear(DIM, DIM)

    def mix(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat([text, image], dim=1)
        joint = joint + self.attn(joint)
        joint = joint + F.gelu(self.ff(joint))
        return joint[:, text.shape[1] :], joint[:, : text.shape[1]]


class ImageTextBlock(TwoStreamBlock):
    identity = KeepImageText

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image, text = self.mix(image, text)
        return image, text


class TextImageBlock(TwoStreamBlock):
    identity = KeepTextImage

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image, text = self.mix(image, text)
        return text, image


class ComputedTextImageBlock(TwoStreamBlock):
    """Text first, not to be read from the source: matched by shape."""

    identity = KeepTextImage

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.mix(image, text)[::-1]


@dataclasses.dataclass
class BlockOutput:
    """An output object that torch's pytree does not know."""

    hidden: Tensor


class ObjectBlock(Block):
    def forward(self, x: Tensor, text: Tensor) -> BlockOutput:
        return BlockOutput(self.mix(x, text))


class ShrinkingBlock(Block):
    """Halves the number of tokens: no input can stand in for its output."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.mix(x, text)[:, ::2]


class Samples(Block):
    """Takes and returns a list with one tensor per sample."""

    def forward(self, x: list[Tensor], text: Tensor) -> list[Tensor]:
        return [self.mix(sample[None], text[i : i + 1])[0] for i, sample in enumerate(x)]


class NamedSamples(Block):
    """The same, to be read from the source."""

    def forward(self, x: list[Tensor], text: Tensor) -> list[Tensor]:
        x = [self.mix(sample[None], text[i : i + 1])[0] for i, sample in enumerate(x)]
        return x  # noqa: RET504 - a name, to be read from the source


class SequenceFirstBlock(Block):
    """Tokens in dimension 0, rows in dimension 1."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.mix(x.transpose(0, 1), text.transpose(0, 1)).transpose(0, 1)


class KeepDecoded(nn.Module):
    def forward(self, **kwargs: Any) -> Any:
        return {"stream": kwargs["stream"], "cache": None}


class OptionsBlock(Block):
    """Takes whatever it is given by name."""

    identity = KeepDecoded

    def forward(self, **options: Any) -> dict[str, Any]:
        return {"stream": self.mix(options["stream"], options["text"]), "cache": None}


# --- models -----------------------------------------------------------------------------------------------------------


class DiT(nn.Module):
    """A stack of one-stream blocks."""

    def __init__(self, block: type[Block] = Block, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.out = nn.Linear(DIM, DIM)

    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        return block(x, text)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = self.run(block, x, text)
        return self.out(x)


class KeywordDiT(DiT):
    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        return block(text=text, gain=0.5, hidden=x)


class NonesDiT(DiT):
    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        nothing, x, nothing_either = block(x, text)
        assert nothing is None
        assert nothing_either is None
        return x


class DictDiT(DiT):
    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        output = block(x, text)
        assert output["note"] == "fine"
        assert output["rest"][0] is None
        return output["hidden"] + output["rest"][1].mean(1, keepdim=True)


class ObjectDiT(DiT):
    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        return block(x, text).hidden


class TwoStream(nn.Module):
    def __init__(self, block: type[TwoStreamBlock], text_first: bool, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.text_first = text_first
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            streams = block(x, text)
            text, x = streams if self.text_first else streams[::-1]
        return self.out(x + text.mean(1, keepdim=True))


class TwoStacks(nn.Module):
    """Double- then single-stream blocks, declared the other way round (trap 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.single_blocks = nn.ModuleList(Block() for _ in range(3))
        self.double_blocks = nn.ModuleList(ImageTextBlock() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.double_blocks:
            x, text = block(x, text)
        for block in self.single_blocks:
            x = block(x, text)
        return x


class Refined(nn.Module):
    """Two refiner stacks beside the main one, one of them nested: they can be named, but have no number."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_refiner = nn.ModuleList(Block() for _ in range(2))
        self.prompt = nn.Module()
        self.prompt.token_refiner = nn.ModuleList(Block() for _ in range(2))
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.prompt.token_refiner:
            text = block(text, text)
        for block in (*self.noise_refiner, *self.blocks):
            x = block(x, text)
        return x


class Stage(nn.Module):
    """A stage of a U-Net: residual layers beside attention blocks."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Block() for _ in range(depth))
        self.resnets = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(F.gelu(resnet(x)), text)
        return x


class UNet(nn.Module):
    """Declared down, up, mid, as diffusers does; runs down, mid, up, with connections across."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Stage(), Stage(1)])
        self.up_blocks = nn.ModuleList([Stage(1), Stage()])
        self.mid_block = Stage(1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        kept = []
        for stage in self.down_blocks:
            x = stage(x, text)
            kept.append(x)
        x = self.mid_block(x, text)
        for stage in self.up_blocks:
            x = stage(x + kept.pop(), text)
        return x


class KeepInEncoder(Keep):
    """The encoder looks at its first layer before it runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIM, 2, batch_first=True)


class EncoderLayer(nn.TransformerEncoderLayer):
    identity = KeepInEncoder


class Encoder(nn.Module):
    """PyTorch's own transformer; its layers return different expressions, and look at their own weights first."""

    def __init__(self) -> None:
        super().__init__()
        layer = EncoderLayer(DIM, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():  # it copies one layer: make them differ
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.encoder(torch.cat([x, text], dim=1))[:, : x.shape[1]]


class NoStacks(nn.Module):
    """Blocks with names of their own, in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.second(self.first(x, text), text)


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.gelu(block(x))
        return x


class Wrapped(nn.Module):
    """As k-diffusion wraps a model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner_model = DiT()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return 0.5 * x + self.inner_model(x, text)


class Fractal(nn.Module):
    """One block used twice in its stack."""

    def __init__(self) -> None:
        super().__init__()
        shared = Block()
        self.blocks = nn.ModuleList([Block(), shared, Block(), shared])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


class SamplesDiT(DiT):
    """As models of images of many sizes do: a list of samples in place of a batch."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        samples = [self.embed(sample) for sample in x]
        for block in self.blocks:
            samples = block(samples, text)
        return self.out(torch.stack(samples))


class SequenceFirstDiT(DiT):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, text = self.embed(x).transpose(0, 1), text.transpose(0, 1)
        for block in self.blocks:
            x = block(x, text)
        return self.out(x.transpose(0, 1))


class FramesInBatch(DiT):
    """Blocks see every token pair as a frame of its own, and the text once per frame."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        rows = x.shape[0]
        x = self.embed(x[:, :4]).unflatten(1, (2, 2)).flatten(0, 1)
        text = text.repeat_interleave(2, dim=0)
        for block in self.blocks:
            x = block(x, text)
        return self.out(x).unflatten(0, (rows, 2)).flatten(1, 2)


class OptionsDiT(DiT):
    def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        return block(stream=x, text=text)["stream"]


class SameShapes(TwoStream):
    """Image and text of the same shape: only what a block adds to tells the streams apart."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return super().forward(x[:, :TEXT_TOKENS], text)


class Nested(nn.Module):
    """Lists inside a list and inside a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.by_name = nn.ModuleDict({name: nn.ModuleList([Block()]) for name in ("one", "other")})

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                x = block(x, text)
        return self.by_name["other"][0](self.by_name["one"][0](x, text), text)


class Pairs(nn.Module):
    """Spatial and temporal blocks in turns, each kind in a list of its own, run by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.temporal_blocks = nn.ModuleList(Block() for _ in range(3))
        self.spatial_blocks = nn.ModuleList(Block() for _ in range(3))

    def run_blocks(self, x: Tensor, text: Tensor) -> Tensor:
        assert len(self.temporal_blocks) == len(self.spatial_blocks)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = temporal(spatial(x, text), text)
        return x

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.run_blocks(x, text)


class FirstLast(DiT):
    """Runs its first block after the others."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks[1:]:
            x = block(x, text)
        return self.blocks[0](x, text)


class Hourglass(nn.Module):
    """Tokens are merged before the blocks in the middle, and split again after them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = (nn.ModuleList(Block() for _ in range(2)) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x[:, :4]
        for block in self.down:
            x = block(x, text)
        skip, x = x, x.unflatten(1, (2, 2)).mean(2)
        for block in self.middle:
            x = block(x, text)
        x = skip + x.repeat_interleave(2, dim=1)
        for block in self.up:
            x = block(x, text)
        return x


class Styled(nn.Module):
    """Returns a prediction in some wrapping."""

    def __init__(self, style: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.style = build("plain"), style

    def forward(self, x: Tensor, text: Tensor) -> Any:
        return self.style(self.model(x, text))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the zoo, and what is to be found in it."""

    build: Callable[[], nn.Module]
    numbered: Sequence[str]
    named: Sequence[str] = ()


def _stack(name: str, depth: int) -> list[str]:
    return [f"{name}.{i}" for i in range(depth)]


ZOO: dict[str, Case] = {
    "plain": Case(DiT, _stack("blocks", 4)),
    "twelve": Case(lambda: DiT(depth=12), _stack("blocks", 12)),
    "expression": Case(lambda: DiT(ExpressionBlock), _stack("blocks", 4)),
    "two_returns": Case(lambda: DiT(TwoReturnsBlock), _stack("blocks", 4)),
    "keyword_only": Case(lambda: KeywordDiT(KeywordBlock), _stack("blocks", 4)),
    "nones": Case(lambda: NonesDiT(NonesBlock), _stack("blocks", 4)),
    "computed_nones": Case(lambda: NonesDiT(ComputedNonesBlock), _stack("blocks", 4)),
    "dict": Case(lambda: DictDiT(DictBlock), _stack("blocks", 4)),
    "image_text": Case(lambda: TwoStream(ImageTextBlock, False), _stack("blocks", 3)),
    "text_image": Case(lambda: TwoStream(TextImageBlock, True), _stack("blocks", 3)),
    "computed_text_image": Case(lambda: TwoStream(ComputedTextImageBlock, True), _stack("blocks", 3)),
    "two_stacks": Case(TwoStacks, _stack("double_blocks", 2) + _stack("single_blocks", 3)),
    "refined": Case(Refined, _stack("blocks", 3), _stack("noise_refiner", 2) + _stack("prompt.token_refiner", 2)),
    "unet": Case(
        UNet,
        [
            "down_blocks.0.attentions.0",
            "down_blocks.0.attentions.1",
            "down_blocks.1.attentions.0",
            "mid_block.attentions.0",
            "up_blocks.0.attentions.0",
            "up_blocks.1.attentions.0",
            "up_blocks.1.attentions.1",
        ],
    ),
    "samples": Case(lambda: SamplesDiT(Samples), _stack("blocks", 4)),
    "named_samples": Case(lambda: SamplesDiT(NamedSamples), _stack("blocks", 4)),
    "sequence_first": Case(lambda: SequenceFirstDiT(SequenceFirstBlock), _stack("blocks", 4)),
    "frames_in_batch": Case(FramesInBatch, _stack("blocks", 4)),
    "options": Case(lambda: OptionsDiT(OptionsBlock), _stack("blocks", 4)),
    "same_shapes": Case(lambda: SameShapes(TextImageBlock, True), _stack("blocks", 3)),
    "computed_same_shapes": Case(lambda: SameShapes(ComputedTextImageBlock, True), _stack("blocks", 3)),
    "nested": Case(
        Nested,
        ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "by_name.one.0", "by_name.other.0"],
    ),
    "pairs": Case(Pairs, [f"{kind}_blocks.{i}" for i in range(3) for kind in ("spatial", "temporal")]),
    "first_last": Case(FirstLast, ["blocks.1", "blocks.2", "blocks.3", "blocks.0"]),
    "hourglass": Case(Hourglass, _stack("down", 2) + _stack("middle", 2) + _stack("up", 2)),
    "encoder": Case(Encoder, _stack("encoder.layers", 3)),
    "no_stacks": Case(NoStacks, []),
    "no_attention": Case(NoAttention, []),
    "wrapped": Case(Wrapped, _stack("inner_model.blocks", 4)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a model of the zoo with random weights, ready for inference."""
    torch.manual_seed(seed)
    return ZOO[name].build().eval().requires_grad_(False)


def inputs(batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """What every model of the zoo takes."""
    random = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, TOKENS, DIM, generator=random),
        "text": torch.randn(batch, TEXT_TOKENS, DIM, generator=random),
    }


def without(model: nn.Module, names: Sequence[str], identity: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Copy a model and put a hand-written identity in place of some of its blocks.

    Args:
        model: not changed.
        names: dotted names of the blocks.
        identity: makes the replacement; left out, the block's class says what it is, or it keeps its first argument.
    """
    model = copy.deepcopy(model)
    for name in names:
        make = identity or getattr(model.get_submodule(name), "identity", Keep)
        model.set_submodule(name, make())
    return model


class Log:
    """A list of what has happened that is no part of any model's state: a weak pass does not take it back."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # into which nothing can look

    def append(self, value: Any) -> None:
        self._queue.put(value)

    def taken(self) -> list[Any]:
        """Return all, and forget it."""
        return [self._queue.get() for _ in range(len(self))]

    def __len__(self) -> int:
        return self._queue.qsize()


class Same:
    """Equal to another one only if it holds the very same object; keeps it alive, so that its id is not used again."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):x}>"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Write down all that installing something in a model could change.

    Every entry of every submodule's `__dict__` by identity (`forward`, training flag, processors, configuration),
    dictionaries among them entry by entry (hooks, parameters, buffers, children); classes and what they define; global
    hooks; the keys of the state dict.
    """

    def contents(owner: dict[Any, Any]) -> dict[Any, Any]:
        return {key: contents(value) if isinstance(value, dict) else Same(value) for key, value in owner.items()}

    modules = dict(model.named_modules())
    classes = {cls for module in modules.values() for cls in type(module).__mro__}
    return {
        "modules": {name: contents(module.__dict__) for name, module in modules.items()},
        "classes of modules": {name: Same(type(module)) for name, module in modules.items()},
        "classes": {cls: contents(dict(vars(cls))) for cls in classes},
        "global hooks": contents(
            {name: value for name, value in vars(nn.modules.module).items() if name.startswith("_global")}
        ),
        "state_dict": list(model.state_dict()),
    }


def is_plain(model: nn.Module) -> bool:
    """Say whether nothing of ours lies on any module."""
    return not any(_is_ours(value) for module in model.modules() for value in vars(module).values())


def resolve(model: nn.Module, layers: Any) -> list[Any]:
    """List the layers that `layers=` names, of whatever kind."""
    return stg.check(model, layers, mode=lambda call: call.compute())


def calls(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> list[str]:
    """Run something and return which of the named modules were called, in the order in which they were."""
    seen: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.append(name)) for name in names
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


# --- diffusers --------------------------------------------------------------------------------------------------------


class KeepTextFirst(nn.Module):
    """(image, text) in, (text, image) out: Flux, in its single-stream blocks too, and SD3."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        return encoder_hidden_states, hidden_states


class KeepStreams(nn.Module):
    """(video, text) in, (video, text) out: CogVideoX, Mochi, HunyuanVideo."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, encoder_hidden_states


class KeepHiddenStates(nn.Module):
    """One stream: Wan, LTX."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


class KeepInTuple(nn.Module):
    """The attention blocks of a U-Net, called with `return_dict=False`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,)


@dataclasses.dataclass(frozen=True)
class Family:
    """One of the tiny models of diffusers."""

    model: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What differs from the configuration in tiny_models.py."""

    @property
    def tiny(self) -> Tiny:
        tiny = MODELS[self.model]
        return dataclasses.replace(tiny, config={**tiny.config, **self.changes})

    @property
    def config(self) -> Mapping[str, Any]:
        return self.tiny.config

    @property
    def skips(self) -> Sequence[str]:
        """One block of each kind."""
        return list(self.tiny.skips)

    @functools.cached_property
    def numbered(self) -> list[str]:
        return expand(self.tiny.layers, [name for name, _ in self.build().named_modules()])

    @functools.cached_property
    def named(self) -> list[str]:
        return expand(self.tiny.named, [name for name, _ in self.build().named_modules()])

    def build(self) -> nn.Module:
        return self.tiny.build(self.model)

    def inputs(self, batch: int = 2, seed: int = 1) -> dict[str, Any]:
        return self.tiny.inputs(batch, seed)

    def without(self, model: nn.Module, name: str) -> nn.Module:
        """Copy a model, with a module in place of a block that returns what the table says."""
        model = copy.deepcopy(model)
        model.set_submodule(name, HandThrough(model.get_submodule(name), self.tiny.skips[name]))
        return model


FAMILIES: dict[str, Family] = {
    "wan": Family("WanTransformer3DModel"),
    "ltx": Family("LTXVideoTransformer3DModel"),
    "mochi": Family("MochiTransformer3DModel"),
    "cogvideox": Family("CogVideoXTransformer3DModel"),
    "hunyuan_video": Family("HunyuanVideoTransformer3DModel", {"num_single_layers": 3}),
    "flux": Family("FluxTransformer2DModel", {"num_single_layers": 3}),
    "sd3": Family("SD3Transformer2DModel"),
    "unet2d": Family("UNet2DConditionModel"),
    "svd": Family(  # with as many levels, and so layers, as the published model
        "UNetSpatioTemporalConditionModel",
        {
            "layers_per_block": 2,
            "block_out_channels": (32, 32, 64, 64),
            "num_attention_heads": (2, 2, 4, 4),
            "down_block_types": (*3 * ("CrossAttnDownBlockSpatioTemporal",), "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", *3 * ("CrossAttnUpBlockSpatioTemporal",)),
        },
    ),
}
