"""The ranks of a process group: that they are in step, and what each of them has computed."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stg_hooks.checks import is_real
from stg_hooks.errors import CallError, RankError, SettingError, TargetError
from stg_hooks.hooks import activation
from stg_hooks.ranks.messages import _samples, is_same, shortened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LENGTH = 4096


class _Link:
    """Our own line between the ranks of a group: on the CPU, where nothing waits for a GPU, apart from its traffic."""

    def __init__(self, group: ProcessGroup, timeout: float) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        # Not new_group: in its names it counts all groups, of which other ranks may have other numbers.
        store = PrefixStore(f"stg_hooks/{group.group_name}", _get_default_store())
        self.lost = ""
        self.unfinished: list[object] = []
        """What an interrupted rank has left for the others to fetch."""
        self.gloo: Any = dist.ProcessGroupGloo(store, group.rank(), group.size(), dt.timedelta(seconds=timeout))


# As long as its group lives: made again under the same name, it would find the addresses of the old one.
_LINKS: WeakKeyDictionary[ProcessGroup, _Link] = WeakKeyDictionary()


class Ranks:
    """The ranks of a process group that make the predictions of each step together.

    Every exchange is one message from each rank to each other one, so that a rank that has failed, died, left or been
    given something else is named on all of them.
    """

    def __init__(self, group: Any, timeout: Any) -> None:
        """Look at the group; send nothing yet.

        Args:
            group: a process group of torch.distributed that this process belongs to.
            timeout: seconds to wait for the other ranks, in each exchange.

        Raises:
            SettingError: the timeout is not a positive number.
            TargetError: `group` is not a process group, or this process is not in it.
        """
        import torch.distributed as dist

        if not is_real(timeout) or not 0 < timeout < math.inf:
            raise SettingError(f"timeout={timeout!r}: expected seconds to wait for the other ranks, above 0.")
        if not dist.is_available() or not dist.is_initialized():
            raise TargetError(
                "group=: torch.distributed has not been set up. Start the script with torchrun and call "
                "torch.distributed.init_process_group() first."
            )
        if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
            raise TargetError(
                f"group={group!r}: expected a process group that this process is in, such as "
                "torch.distributed.group.WORLD."
            )
        self.timeout = float(timeout)
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self.rank: int = dist.get_rank(group)
        self.size = len(self.ranks)
        self._group = group
        self._is_told = False

    def jobs(self, count: int) -> range:
        """Say which of the jobs of a call this rank does; where there are more ranks than jobs, some do the same."""
        return self._jobs_of(self.rank, count) or range(self.rank % count, self.rank % count + 1)

    def _jobs_of(self, rank: int, count: int) -> range:
        # Neighbours go together, and the first ranks get more: cond and weak predictions share work.
        return range(-(-rank * count // self.size), -(-(rank + 1) * count // self.size))

    def enter(self, model: nn.Module) -> None:
        """Meet the other ranks, and find out whether they hold the same model.

        Raises:
            RankError: they do not, or they did not come in time.
        """
        if self._group not in _LINKS:
            try:
                _LINKS[self._group] = _Link(self._group, self.timeout)
            except RuntimeError as error:
                raise RankError(
                    f"rank {self.rank}: not all {self.size} ranks of the group have come within {self.timeout:g} s. "
                    f"Each of them has to enter stg.apply(..., group=...), or call its stg.Guider. ({_first(error)})"
                ) from error
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
        weights = [p for p in model.parameters() if type(p) is nn.Parameter and p.device.type != "meta"]
        about = {"model": type(model).__name__, "training": model.training, "parameters": shapes}
        self._agree("begins", {**about, "weights": _samples(weights, 1, 64)})

    def agree(self, said: Mapping[str, object]) -> None:
        """Find out whether all ranks have made the same call, and without an error.

        Raises:
            RankError: they have not, or not in time.
        """
        self._agree("made a call", said)

    def leave(self, error: BaseException | None) -> None:
        """Tell the other ranks that this one is leaving, or why.

        Raises:
            RankError: another one is not leaving.
        """
        if error is None:
            self._agree("leaves", {})
        else:
            self._tell(error)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other ranks of an error inside a `with`."""
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise

    def gather(self, mine: Mapping[int, Sequence[Tensor]], count: int) -> list[list[Tensor]]:
        """Exchange what the ranks have computed.

        Args:
            mine: this rank's predictions by job, all of the same shapes, as on the other ranks.
            count: number of jobs.

        Returns:
            The predictions of all jobs, the same bits on all ranks.

        Raises:
            RankError: another rank was lost.
        """
        import torch.distributed as dist

        like = next(iter(mine.values()))
        gloo, on_cpu = _LINKS[self._group].gloo, like[0].device.type == "cpu"
        everything, works = [], []
        with self._watching():
            for job in range(count):
                owner = next(rank for rank in range(self.size) if job in self._jobs_of(rank, count))
                source = mine[job] if owner == self.rank else like
                found = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in source]
                if owner == self.rank:
                    for copy, tensor in zip(found, source, strict=True):
                        copy.copy_(tensor)
                everything.append(found)
                for copy in found:  # as bytes: not every backend knows every dtype
                    raw = copy.view(-1).view(torch.uint8)
                    if on_cpu:
                        works.append(gloo.broadcast(raw, owner))
                    else:
                        works.append(dist.broadcast(raw, self.ranks[owner], self._group, async_op=True))
            for work in works:
                work.wait(dt.timedelta(seconds=self.timeout)) if on_cpu else work.wait()
        return everything

    def _agree(self, event: str, said: Mapping[str, object]) -> None:
        self._is_told = False
        mine = {"event": event, **{key: shortened(value) for key, value in said.items()}}
        for rank, theirs in self._exchange(mine).items():
            if "error" in theirs:
                raise RankError(f"rank {rank} failed where rank {self.rank} {event}: {theirs['error']}")
            different = next(
                (key for key in {**mine, **theirs} if not is_same(key, mine.get(key), theirs.get(key))), None
            )
            if different is not None:
                raise RankError(
                    f"the ranks are not doing the same: {different} is {mine.get(different, 'missing')} on rank "
                    f"{self.rank}, but {theirs.get(different, 'missing')} on rank {rank} (when rank {self.rank} "
                    f"{event}). Run the same code with the same settings and the same seeds on every rank."
                )

    def _tell(self, error: BaseException) -> None:
        if self._is_told or isinstance(error, RankError):  # which is known to the others
            return
        self._is_told = True
        with contextlib.suppress(RankError):  # the error itself is on its way
            waits = isinstance(error, Exception)  # an interrupt must not wait for other ranks
            self._exchange({"error": shortened(f"{type(error).__name__}: {error}")}, waits)

    def _exchange(self, message: Mapping[str, str], waits: bool = True) -> dict[int, dict[str, str]]:
        """Send a message to every other rank, and return theirs; nothing, where the others do not wait."""
        text = "\n".join(f"{key}\t{value}" for key, value in message.items()).encode("ascii", "backslashreplace")
        assert len(text) <= _LENGTH
        mine = torch.frombuffer(bytearray(text.ljust(_LENGTH)), dtype=torch.uint8)
        link = _LINKS.get(self._group)
        if link is None:
            return {}  # the ranks have not met
        peers = [rank for rank in range(self.size) if rank != self.rank]
        found = {peer: torch.empty_like(mine) for peer in peers}
        deadline = time.monotonic() + self.timeout
        with self._watching():
            works, waiting = [], 0
            try:
                for waiting in peers:
                    works.append((waiting, link.gloo.recv([found[waiting]], waiting, 0)))
                    works.append((waiting, link.gloo.send([mine], waiting, 0)))
                if not waits:
                    link.unfinished += [mine, found, works]
                    return {}
                for waiting, work in works:  # noqa: B007 - named in the error
                    work.wait(dt.timedelta(seconds=max(deadline - time.monotonic(), 0.05)))
            except RuntimeError as error:
                raise RuntimeError(f"no answer from rank {waiting}: {_first(error)}") from error
        texts = {peer: bytes(tensor.tolist()).decode("ascii").rstrip(" ") for peer, tensor in found.items()}
        return {peer: dict(line.split("\t", 1) for line in text.split("\n")) for peer, text in texts.items()}

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Turn what the backend raises into an error of ours, and never use a broken line again."""
        link = _LINKS[self._group]
        if link.lost:
            raise RankError(
                f"this group cannot be used any more: {link.lost} End all of its processes, and start again."
            )
        try:
            yield
        except RuntimeError as error:
            link.lost = (
                f"rank {self.rank} of {self.size} has lost the others ({_first(error)}). One of them has died, has "
                f"left the `with`, or took longer than timeout={self.timeout:g} s."
            )
            raise RankError(link.lost) from error
        except BaseException:
            link.lost = f"rank {self.rank} was interrupted while it waited for the others."
            raise


def ranks_from(group: ProcessGroup | None, timeout: float, on: str) -> Ranks | None:
    """Return the ranks to share calls with; `None` without a group, or in a group of one."""
    if group is None:
        return None
    if on == "uncond":
        raise SettingError("group= cannot be combined with on='uncond', which makes no extra pass. Leave one out.")
    ranks = Ranks(group, timeout)
    return ranks if ranks.size > 1 else None


def check_own_copy(model: nn.Module, ranks: Ranks) -> None:
    """Raise if a model is spread over ranks that are to make different calls of it.

    Args:
        model: the denoiser.
        ranks: the ranks.

    Raises:
        SettingError: its parameters, its tokens or its gradients are.
    """
    others = set(ranks.ranks) - {ranks.ranks[ranks.rank]}
    for module in model.modules():
        meshes = [getattr(p, "device_mesh", None) for p in module.parameters(recurse=False)]
        parallel = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
        meshes.append(getattr(parallel, "_mesh", None))
        members = {rank for mesh in meshes if mesh is not None for rank in mesh.mesh.flatten().tolist()}
        if isinstance(module, nn.parallel.DistributedDataParallel):
            import torch.distributed as dist

            members |= set(dist.get_process_group_ranks(module.process_group))
        if members & others:
            raise SettingError(
                f"group=: {type(model).__name__} is itself spread over ranks {sorted(members)} (FSDP, DDP, tensor or "
                "context parallelism), which have to make the same calls of it. Leave group out, or pass a group of "
                "ranks that each hold all that their calls need."
            )


def _first(error: BaseException) -> str:
    """Return the first sentence of what gloo says, without where in its source it says so."""
    return re.sub(r"^\[\S+\] ", "", str(error).strip()).split("\n")[0].split(". ")[0]


def check_alone(session: object, ranks: Ranks | None, model: nn.Module) -> None:
    """Raise if several sessions guide the same calls, and one of them spreads these over ranks.

    Args:
        session: one of them.
        ranks: the ranks that it spreads its calls over, if any.
        model: the module that it guides.

    Raises:
        CallError: another one is.
    """
    for other in activation.others(session):
        if (ranks or getattr(other, "ranks", None)) and any(m is model for m in getattr(other, "models", ())):
            raise CallError(
                f"group=: calls of {type(model).__name__} are guided twice here, and cannot be spread over ranks then. "
                "Use one stg.apply(branches=[...], group=...)."
            )
