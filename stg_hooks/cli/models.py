"""Load what MODEL names: a folder, a model of the hub, or the embedded one."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import importlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stg_hooks.cli.failures import FailureError

if TYPE_CHECKING:  # torch loads when a model does: `--help` must not wait for it
    from torch import nn

DEMO = "demo"
DENOISERS = ("transformer", "transformer_2", "unet")


class Dtype(str, enum.Enum):
    """In what numbers the weights are kept."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Offload(str, enum.Enum):
    """What of a pipeline leaves the accelerator while it is not needed."""

    none = "none"
    model = "model"
    layer = "layer"  # not "sequential", as diffusers says: that is an `execution` here
    group = "group"


@dataclasses.dataclass(frozen=True)
class Source:
    """Which model, and how it is to be loaded."""

    name: str
    dtype: Dtype = Dtype.auto
    device: str = "auto"
    offload: Offload = Offload.none

    def denoisers(self) -> dict[str, nn.Module]:
        """Build the denoisers from their configurations, without weights: enough to look at, and quick.

        Raises:
            FailureError: there is no such model.
        """
        if self.name == DEMO:
            from stg_hooks import demo
            from stg_hooks.hosts import denoisers_of

            return denoisers_of(demo.load())
        diffusers = _diffusers()
        with _finding(self.name):
            found = _components(self.name)
        models = {}
        for key, class_name in found.items():
            cls = getattr(diffusers, class_name, None)
            if cls is None:
                raise FailureError(f"{self.name}: diffusers has no class {class_name}. A newer version may have.")
            with _finding(self.name):
                config = cls.load_config(self.name, **({"subfolder": key} if key else {}))
            with importlib.import_module("accelerate").init_empty_weights():
                models[key] = cls.from_config(config)
        return models

    def check_arguments(self, names: Iterable[str]) -> None:
        """Check that the pipeline takes arguments of these names, where its class is known before it is loaded.

        Raises:
            SettingError: it does not take one of them.
        """
        cls: Any = None
        if self.name == DEMO:
            from stg_hooks import demo

            cls = type(demo.load())
        else:
            with contextlib.suppress(FailureError):  # loading tells, too
                diffusers = _diffusers()
                with _finding(self.name):
                    cls = getattr(
                        diffusers, str(diffusers.DiffusionPipeline.load_config(self.name)["_class_name"]), None
                    )
        if cls is not None:
            from stg_hooks.study.sampling import check_arguments

            check_arguments(cls.__name__, inspect.signature(cls.__call__).parameters, names)

    def pipeline(self) -> Any:
        """Load the pipeline and put it where it is to run.

        Raises:
            FailureError: it cannot be loaded, or not onto this device.
        """
        import torch

        device = torch.device(self.where)
        try:
            torch.zeros(1, device=device).tolist()
        except (RuntimeError, NotImplementedError, AssertionError):
            raise FailureError(f"--device {self.device}: this torch cannot compute there.", 2) from None
        if self.name == DEMO:
            from stg_hooks import demo

            if self.offload is not Offload.none:
                raise FailureError(f"--offload {self.offload.value}: the embedded model is not offloaded.", 2)
            pipe = demo.load().to(device)
            return pipe if self.numbers == "float32" else pipe.to(getattr(torch, self.numbers))
        diffusers = _diffusers()
        with _finding(self.name):
            pipe = diffusers.DiffusionPipeline.from_pretrained(self.name, torch_dtype=getattr(torch, self.numbers))
        if self.offload is Offload.model:
            pipe.enable_model_cpu_offload(device=device)
        elif self.offload is Offload.layer:
            pipe.enable_sequential_cpu_offload(device=device)
        elif self.offload is Offload.group:
            pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
        else:
            pipe.to(device)
        return pipe

    @property
    def where(self) -> str:
        """The device: the accelerator if there is one (each process of a launcher has its own), unless it is named."""
        import torch

        if self.device == "auto":
            if torch.cuda.is_available():
                return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
            return "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            raise FailureError(f"--device {self.device}: no such device. Try cpu, cuda, cuda:1 or mps.", 2) from None
        if kind in ("cuda", "mps") and not getattr(torch, "cuda" if kind == "cuda" else "mps").is_available():
            raise FailureError(f"--device {self.device}: this torch finds no {kind} device here.")
        return self.device

    @property
    def numbers(self) -> str:
        """The dtype: bfloat16 on an accelerator and float32 on a CPU, and for the embedded model, unless named."""
        if self.dtype is not Dtype.auto:
            return str(self.dtype.value)
        return "float32" if self.name == DEMO or self.where == "cpu" else "bfloat16"


def _diffusers() -> Any:
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise FailureError("loading a model needs diffusers: pip install diffusers transformers accelerate") from error


def _components(name: str) -> dict[str, str]:
    """Return the classes of the denoisers by their names in the pipeline; one model on its own has an empty name."""
    folder = Path(name)
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "_class_name" not in config:
            raise FailureError(f"{name}: its config.json names no diffusers class (_class_name).")
        return {"": config["_class_name"]}
    index = _diffusers().DiffusionPipeline.load_config(name)
    found = {key: index[key][1] for key in DENOISERS if key in index and index[key][1] is not None}
    if not found:
        raise FailureError(f"{name}: a {index.get('_class_name')} without any of {', '.join(DENOISERS)}.")
    return found


@contextlib.contextmanager
def _finding(name: str) -> Iterator[None]:
    """Say in one line why a model could not be found or fetched."""
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise FailureError(
            f"{name}: no such folder. Name a folder that a pipeline was saved in, a model of the hub such as "
            "genmo/mochi-1-preview, or demo."
        )
    try:
        with _quiet():
            yield
    except (OSError, ValueError) as error:
        causes = {type(cause).__name__ for cause in _chain(error)}
        if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in _chain(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the cache of the hub") from error
        if Path(name).exists():
            line = str(error).strip().splitlines()[0]
            raise FailureError(f"{name}: no pipeline that diffusers can load: {line}") from error
        if "GatedRepoError" in causes:
            raise FailureError(
                f"{name}: the hub gives it only after its terms were accepted, to a logged-in user."
            ) from error
        if causes & {"RepositoryNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"}:
            raise FailureError(f"{name}: the hub has no such pipeline, or it is private.") from error
        offline = os.environ.get("HF_HUB_OFFLINE") or "OfflineModeIsEnabled" in causes
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise FailureError(f"{name}: not on this machine, and {why}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the hub's package says of each try, and of an argument that diffusers gives it."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        log.setLevel(before)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
