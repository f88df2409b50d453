"""Models built as those of their authors' own repositories are, each named for the shape of code that it has.

They are written for these tests; which published model has the shape is said with each. All take what the models of the
zoo take.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.opaque import attend
from tests.zoo import DIM, Attention, Block

HEADS = 2


def heads_of(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Take and return `(batch, tokens, heads, channels)`, in a way that torch cannot look into."""
    return attend(q, k, v)


def attention_in_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernel(*(part.transpose(1, 2) for part in (q, k, v))).flatten(2)


class QKNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(DIM // HEADS), nn.RMSNorm(DIM // HEADS)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Double(nn.Module):
    """HunyuanVideo's `MMDoubleStreamBlock`: its fused projections are its own, and no module is called attention."""

    def __init__(self) -> None:
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_attn_qkv", nn.Linear(DIM, 3 * DIM))
            self.add_module(f"{stream}_attn_proj", nn.Linear(DIM, DIM))
            self.add_module(f"{stream}_mlp", nn.Linear(DIM, DIM))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)

    def forward(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(heads_of(self.img_attn_qkv(img)), heads_of(self.txt_attn_qkv(txt)), strict=True)
        mixed = self.mix(*(torch.cat(pair, dim=2) for pair in pairs))
        img = img + self.img_attn_proj(mixed[:, : img.shape[1]])
        txt = txt + self.txt_attn_proj(mixed[:, img.shape[1] :])
        return img + F.gelu(self.img_mlp(img)), txt + F.gelu(self.txt_mlp(txt))


class KernelDouble(Double):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_in_kernel(q, k, v)


class Single(nn.Module):
    """Flux's `SingleStreamBlock`: one projection for attention and feed-forward, and a norm of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(DIM, 5 * DIM), nn.Linear(3 * DIM, DIM)
        self.norm = QKNorm()

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        qkv, mlp = self.linear1(F.layer_norm(x, x.shape[-1:])).split([3 * DIM, 2 * DIM], dim=-1)
        q, k, v = heads_of(qkv)
        q, k = self.norm(q, k)
        return x + self.linear2(torch.cat((self.mix(q, k, v), F.gelu(mlp)), 2))


class KernelSingle(Single):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_in_kernel(q, k, v)


class Processor:
    def __call__(self, block: Plain, x: Tensor) -> Tensor:
        q, k, v = heads_of(block.linear1(x))
        return x + block.linear2(attention(q, k, v))


class Plain(nn.Module):
    """A single-stream block without any norm: only a call of a function in its code says what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.linear1(x))
        return x + self.linear2(attention(q, k, v))


class Delegated(Plain):
    """Open-Sora 2's blocks, whose code is in a processor."""

    processor: type = Processor

    def __init__(self) -> None:
        super().__init__()
        self.process = self.processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.process(self, x)


def weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v)


class Unnamed:
    def __call__(self, block: Plain, x: Tensor) -> Tensor:
        q, k, v = heads_of(block.linear1(x))
        return x + block.linear2(weighted(q, k, v))


class Unseen(Delegated):
    """A block of which no name tells what it computes."""

    processor = Unnamed


class Streams(nn.Module):
    """Flux, HunyuanVideo, Open-Sora 2: double-stream blocks, then both streams as one."""

    def __init__(self, double: type[nn.Module] = Double, single: type[nn.Module] = Single) -> None:
        super().__init__()
        self.txt_in = nn.Linear(DIM, DIM)
        self.single_blocks = nn.ModuleList(single() for _ in range(2))
        self.double_blocks = nn.ModuleList(double() for _ in range(2))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.through_blocks(x, text)

    def through_blocks(self, x: Tensor, text: Tensor) -> Tensor:
        img, txt = x, self.txt_in(text)
        for block in self.double_blocks:
            img, txt = block(img, txt)
        img = torch.cat((img, txt), 1)
        for block in self.single_blocks:
            img = block(img)
        return self.out(img[:, : x.shape[1]])


class Chooses(Streams):
    """Open-Sora 2: its class has no `forward`; the instance gets one of its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.through_blocks


Chooses.forward = nn.Module.forward


class SkipBlock(nn.Module):
    """U-ViT's block: what an earlier block gave comes as a second argument."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Linear(DIM, DIM)
        self.skip_linear = nn.Linear(2 * DIM, DIM) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat((x, skip), dim=-1))
        x = x + self.attn(x)
        return x + F.gelu(self.mlp(x))


class Hourglass(nn.Module):
    """U-ViT: a block between two lists of its class, in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.in_blocks = nn.ModuleList(SkipBlock() for _ in range(2))
        self.mid_block = SkipBlock()
        self.out_blocks = nn.ModuleList(SkipBlock(skip=True) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, skips = x + text.mean(1, keepdim=True), []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return x


class UNetBlock(nn.Module):
    """EDM's and EDM2's block: a U-Net's block with attention in it, which may also change the resolution."""

    def __init__(self, into: int, out: int, down: bool = False, attention: bool = True) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv1d(into, 2 * out, 3, padding=1), nn.Conv1d(2 * out, out, 3, padding=1)
        self.down = down
        self.attn_qkv = nn.Linear(out, 3 * out) if attention else None
        self.attn_proj = nn.Linear(out, out) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x[:, ::2] if self.down else x
        x = x + F.silu(self.conv1(F.silu(self.conv0(x.mT)))).mT * emb
        if self.attn_qkv is not None:
            q, k, v = self.attn_qkv(x).unflatten(-1, (-1, 3)).unbind(-1)
            w = torch.einsum("nqc,nkc->nqk", q, k / q.shape[-1] ** 0.5).softmax(dim=2)
            x = x + self.attn_proj(torch.einsum("nqk,nkc->nqc", w, v))
        return x


class Dictionaries(nn.Module):
    """EDM, EDM2: blocks with and without attention in dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.dec = nn.ModuleDict({"in0": UNetBlock(DIM, DIM), "in1": UNetBlock(DIM, DIM, attention=False)})
        self.enc = nn.ModuleDict(
            {"conv": nn.Linear(DIM, DIM), "block0": UNetBlock(DIM, DIM), "down": UNetBlock(DIM, DIM, down=True)}
        )
        self.up = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        emb = text.mean((1, 2)).view(-1, 1, 1)
        kept = x
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
        for block in self.dec.values():
            x = block(x, emb)
        return kept + self.up(x.repeat_interleave(2, 1)[:, : kept.shape[1]])


class Stages(nn.Module):
    """denoising-diffusion-pytorch: attention in lists of stages, to which the model adds its input, and one between."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(nn.ModuleList([nn.Linear(DIM, DIM), Attention()]) for _ in range(2))
        self.ups = nn.ModuleList(nn.ModuleList([nn.Linear(DIM, DIM), Attention()]) for _ in range(2))
        self.mid_attn = Attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + text.mean(1, keepdim=True)
        for conv, attn in self.downs:
            x = F.silu(conv(x))
            x = attn(x) + x
        x = self.mid_attn(x) + x
        for conv, attn in self.ups:
            x = F.silu(conv(x))
            x = attn(x) + x
        return x


class Masked(nn.Module):
    """MDT: blocks that only a step of training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.en_blocks = nn.ModuleList(Block() for _ in range(2))
        self.sideblocks = nn.ModuleList([Block()])
        self.de_blocks = nn.ModuleList([Block()])

    def interpolate(self, x: Tensor, text: Tensor) -> Tensor:
        for sideblock in self.sideblocks:
            x = sideblock(x, text)
        return x

    def forward(self, x: Tensor, text: Tensor, enable_mask: bool = False) -> Tensor:
        for block in self.en_blocks:
            x = block(x, text)
        if self.training is not None and enable_mask:
            x = self.interpolate(x, text)
        for i in range(len(self.de_blocks)):
            block = self.de_blocks[i]
            x = block(x, text)
        return x


@dataclasses.dataclass(frozen=True)
class Stream:
    x: Tensor
    context: Tensor
    enabled: bool = True
    mask: Tensor | None = None


class StreamBlock(nn.Module):
    """LTX-2's block: takes and returns a frozen dataclass for video and for audio, either of which may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio, self.between = Block(), Block(), nn.Linear(DIM, DIM)

    def forward(self, video: Stream | None, audio: Stream | None) -> tuple[Stream | None, Stream | None]:
        vx = self.video(video.x, video.context) if video is not None else None
        ax = self.audio(audio.x, audio.context) if audio is not None else None
        if vx is not None and ax is not None:
            vx, ax = vx + self.between(ax).mean(1, keepdim=True), ax + self.between(vx).mean(1, keepdim=True)
        return (
            dataclasses.replace(video, x=vx) if video is not None else None,
            dataclasses.replace(audio, x=ax) if audio is not None else None,
        )


class Carrier:
    """An object of no special kind."""

    def __init__(self, x: Tensor, text: Tensor) -> None:
        self.x, self.text, self.steps = x, text, 0


class CarrierBlock(Block):
    """Takes and returns an object, which it makes anew."""

    def forward(self, carrier: Carrier) -> Carrier:
        made = Carrier(self.mix(carrier.x, carrier.text), carrier.text)
        made.steps = carrier.steps + 1
        return made


class Pair(NamedTuple):
    x: Tensor
    text: Tensor


class PairBlock(Block):
    def forward(self, pair: Pair) -> Pair:
        return pair._replace(x=self.mix(pair.x, pair.text))


class Objects(nn.Module):
    """Passes its streams from block to block in objects."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        block = {"streams": StreamBlock, "video": StreamBlock, "carrier": CarrierBlock, "pair": PairBlock}[kind]
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        if self.kind in ("streams", "video"):
            video: Stream | None = Stream(x, text)
            audio = Stream(x.flip(1) * 0.5, text * 0.5) if self.kind == "streams" else None
            for block in self.blocks:
                video, audio = block(video, audio)
            return video.x if audio is None else video.x + audio.x
        made = (Carrier if self.kind == "carrier" else Pair)(x, text)
        for block in self.blocks:
            made = block(made)
        return made.x


class Extractor(nn.Module):
    """What prepares conditions, with attention of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, faces: Tensor) -> Tensor:
        for layer in self.layers:
            faces = layer(faces, faces)
        return faces


class WithFaces(nn.Module):
    """ConsisID: an extractor of faces, declared and run before the blocks, whose name says nothing here."""

    def __init__(self) -> None:
        super().__init__()
        self.former = Extractor()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        faces = text.to(device=x.device, dtype=x.dtype)
        faces = self.former(faces)
        for block in self.blocks:
            x = block(x, faces)
        return x


class Fed(nn.Module):
    """The same, with blocks for conditions of the model's own, and a call through something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first_blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        hidden = text * 2
        for block in self.first_blocks:
            hidden = block(hidden, text)
        for block in self.blocks:
            x = run(block, x, hidden)
        return x


def run(block: nn.Module, *args: Any) -> Tensor:
    return block(*args)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = {
    "streams": (Streams, ("double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"), ()),
    "kernels": (
        lambda: Streams(KernelDouble, KernelSingle),
        ("double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"),
        (),
    ),
    "without_norms": (
        lambda: Streams(Double, Plain),
        ("double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"),
        (),
    ),
    "processors": (
        lambda: Streams(Double, Delegated),
        ("double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"),
        (),
    ),
    "chooses": (Chooses, ("double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"), ()),
    "hourglass": (Hourglass, ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"), ()),
    "dictionaries": (Dictionaries, ("enc.block0", "enc.down", "dec.in0"), ()),
    "stages": (Stages, ("downs.0.1", "downs.1.1", "mid_attn", "ups.0.1", "ups.1.1"), ()),
    **{
        f"objects_{kind}": (functools.partial(Objects, kind), ("blocks.0", "blocks.1", "blocks.2"), ())
        for kind in ("streams", "video", "carrier", "pair")
    },
    "masked": (Masked, ("en_blocks.0", "en_blocks.1", "de_blocks.0"), ("sideblocks.0",)),
    "with_faces": (WithFaces, ("blocks.0", "blocks.1"), ("former.layers.0", "former.layers.1")),
    "fed": (Fed, ("blocks.0", "blocks.1"), ("first_blocks.0", "first_blocks.1")),
}
"""Name to the model, its numbered layers in running order, and the others."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval().requires_grad_(False)
