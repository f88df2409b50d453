"""Run checks on several processes that are the ranks of a group, and say in which of them each check has failed.

Starting a process costs seconds, so that one set of them makes all checks of a test file, one after the other. A check
is a function of this process's rank and of how many ranks there are.
"""

from __future__ import annotations

import datetime as dt
import faulthandler
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

Check = Callable[[int, int], None]


def run(module: str, checks: Sequence[str], size: int, folder: Path, limit: float) -> dict[str, str]:
    """Make all checks of a module (its `CHECKS`) on `size` ranks; return what went wrong, by the name of the check."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    logs = [folder / f"log{rank}" for rank in range(size)]
    processes = []
    deadline = time.monotonic() + limit
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.ranks", module, str(rank), str(size), str(folder), str(0.8 * limit)]
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pass  # what has not been written down counts as failed
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, str] = {}
    for name in checks:
        for rank, log in enumerate(logs):
            result = folder / f"{name}{rank}"
            said = json.loads(result.read_text()) if result.exists() else f"did not end:\n{log.read_text()[-3000:]}"
            if said:
                found[name] = found.get(name, "") + f"\nrank {rank}: {said}"
    return found


def same_on_all(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Assert that all ranks of a group have the same bits."""
    everything = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everything, tensor.contiguous(), group)
    assert all(torch.equal(other, tensor) for other in everything)


def main(module: str, rank: int, size: int, folder: Path, limit: float) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(limit)  # into the log, if it hangs
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=dt.timedelta(seconds=60),
    )
    checks: dict[str, Check] = importlib.import_module(module).CHECKS
    for name, check in checks.items():
        torch.manual_seed(0)
        said = ""
        try:
            check(rank, size)
        except BaseException:
            said = traceback.format_exc()
        print(f"{name}: {time.process_time():.1f} s so far", flush=True)
        (folder / f"{name}{rank}").write_text(json.dumps(said))
    os._exit(0)  # groups that have lost a rank cannot be taken down


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5]))
