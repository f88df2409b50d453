"""What the passes of a model are made of: its blocks, as large as can be, and the layers that are skipped."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from stg_hooks.hooks.forward import Patch, patched
from stg_hooks.model.attention import attention_modules, is_attention
from stg_hooks.model.layers import Layer

if TYPE_CHECKING:
    from stg_hooks.modes.switch import Switch


class Units:
    """The modules whose outputs passes of a model share, and the blocks that are counted in them."""

    def __init__(self, model: nn.Module, switches: Sequence[Switch], layers: Sequence[Layer]) -> None:
        """Look at the model; change nothing yet.

        Args:
            model: the denoiser.
            switches: the layers that each branch skips.
            layers: all layers of the model.
        """
        self._blocks = {id(layer.module) for layer in layers if layer.index is not None}
        starts = [[_block_of(module, layers) for module in switch.modules] for switch in switches]
        self.starts = [{id(module) for module in modules} for modules in starts]
        """For each branch, the units (by `id`) before the first of which its prefix ends."""
        self.prefix = prefix_units(model, list(itertools.chain(*starts)))
        """Those that a prefix is made of."""
        skipped = [module for switch in switches for module in switch.modules]
        batched = prefix_units(model, skipped)
        self._blocks_in = {
            id(unit): sum(id(module) in self._blocks for module in unit.modules()) for unit in (*self.prefix, *batched)
        }
        self.aside = {
            id(unit)
            for unit in self.prefix
            if not self._blocks_in[id(unit)] and (is_attention(unit) or attention_modules(unit))
        }
        """Those of them (by `id`) that refine or pool text: their outputs are small, and models use them again."""
        # What surrounds the blocks may hold tables that have no rows.
        self.batched = [u for u in batched if self._blocks_in[id(u)] or any(u is module for module in skipped)]
        """Those through which more rows go in one pass."""
        self._patches: dict[int, Patch] = {}

    def of(self, way: str) -> list[nn.Module]:
        """List the units that are patched for a way of computing weak predictions."""
        if way == "batched":  # and for sequential passes, which take their place where they fail
            return list({id(unit): unit for unit in (*self.prefix, *self.batched)}.values())
        return self.prefix if way == "sequential" else []

    @contextmanager
    def installed(self, way: str) -> Iterator[None]:
        """Patch the units of a way within a `with`, without effect until actions are pushed."""
        with ExitStack() as stack:
            self._patches = {id(unit): stack.enter_context(patched(unit)) for unit in self.of(way)}
            yield

    def patches(self, units: Iterable[nn.Module]) -> list[Patch]:
        """Return the patches of some of the units."""
        return [self._patches[id(unit)] for unit in units]

    def blocks_run(self, switch: Switch, not_run: Iterable[int]) -> tuple[int, int]:
        """Count the blocks that ran, and did not, in a weak pass in which these units did not, nor skipped layers."""
        skipped = sum(id(module) in self._blocks for module in switch.bypassed)
        saved = skipped + sum(self._blocks_in[unit] for unit in not_run)
        return len(self._blocks) - saved, saved


def prefix_units(model: nn.Module, starts: Collection[nn.Module]) -> list[nn.Module]:
    """List the modules whose outputs a prefix is made of: blocks, as large as can be, and those where a prefix ends.

    Args:
        model: the denoiser.
        starts: the modules before which the prefixes of the branches end.

    Returns:
        Modules of which none contains another: `starts`, and entries of lists and modules with attention that hold
        none of them.
    """
    wanted = {id(module) for module in starts}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        for child in module.children():
            if id(child) in wanted:
                yield child
            elif _is_gone_through(child) or any(id(inner) in wanted for inner in child.modules()):
                yield from walk(child)
            elif is_list or is_attention(child) or attention_modules(child):
                yield child

    return list({id(unit): unit for unit in walk(model)}.values())


def _is_gone_through(module: nn.Module) -> bool:
    """Tell whether a model may call what is in a module instead of the module itself."""
    # A module from `torch.compile(block)` has its `forward` on the instance.
    has_no_forward = type(module).forward is nn.Module.forward and "forward" not in module.__dict__
    # The U-Nets of latent diffusion do so, in a function that the `forward` of their kind of Sequential calls as well.
    return has_no_forward or (isinstance(module, nn.Sequential) and type(module) is not nn.Sequential)


def _block_of(module: nn.Module, layers: Sequence[Layer]) -> nn.Module:
    """Find the block that a module is in: a prefix ends before it."""
    for layer in layers:
        if any(inner is module for inner in layer.module.modules()):
            return layer.module
    return module
