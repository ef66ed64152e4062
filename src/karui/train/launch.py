"""Running a training on the devices that its settings name, in this process or in several."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.spawn import ProcessException

from karui.errors import KaruiError, SettingError, TrainingError
from karui.train.training import Training

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def launch(training: Training, work: Callable[[Fabric], None], *, unused: bool) -> bool:
    """Run `work` on every device; say whether that happened in this very process.

    With several devices each gets a process: forked where that is safe (so that a model or a loss need not be
    picklable), spawned where CUDA is already in use. A forked process computes with one thread. Started by `torchrun`
    or a cluster, the processes exist already.

    Args:
        training: names accelerator, devices, strategy and precision.
        work: the training; what it made must be left in a file when it runs in another process.
        unused: whether some parameters may get no gradient in a step.

    Raises:
        SettingError: the machine has no such accelerator or not so many devices.
        TrainingError: a process died.
        KaruiError: what `work` raised in any process.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import TorchElasticEnvironment

    several = training.devices > 1
    external = several and TorchElasticEnvironment.detect()
    method = "popen" if external else _start_method()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*AMP with fp16")  # another precision than asked for is no answer
            fabric = Fabric(
                accelerator=training.accelerator,
                devices=training.devices,
                precision=training.precision,  # pyright: ignore[reportArgumentType]  (checked by Training)
                strategy=_ddp(method, unused) if several else "auto",
            )
    except (ValueError, RuntimeError, ImportError, UserWarning) as error:
        raise SettingError(
            f"Training on accelerator '{training.accelerator}', devices {training.devices}, precision "
            f"'{training.precision}' is not possible here: {str(error).splitlines()[0]}",
            "Set accelerator='cpu', devices=1 and precision='32-true' to train on any machine.",
        ) from error
    if not several or external:
        fabric.launch(work)
        return True
    _launch_processes(fabric, work, method)
    return False


def _start_method() -> str:
    """How processes begin: forking is not safe once CUDA is in use, nor there on Windows."""
    forkable = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    return "fork" if forkable else "spawn"


def _ddp(method: str, unused: bool) -> Any:
    from lightning_fabric.strategies import DDPStrategy

    return DDPStrategy(start_method=method, find_unused_parameters=unused)  # pyright: ignore[reportArgumentType]


def _launch_processes(fabric: Fabric, work: Callable[[Fabric], None], method: str) -> None:
    """Run `work` in new processes; the first error of ours that any of them raised is raised here."""
    errors = multiprocessing.get_context(method).SimpleQueue()
    before = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.WARNING)  # each process would announce itself
    try:
        fabric.launch(Guarded(work, errors, forked=method == "fork"))
    except ProcessException as error:
        if not errors.empty():
            kind, message, hint = errors.get()
            raise kind(message, hint) from error
        last = str(error).strip().splitlines()[-1]
        raise TrainingError(f"One of {fabric.world_size} training processes failed: {last}") from error
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Guarded:
    """Work that sends the error it ends with to the process that waits for it."""

    def __init__(self, work: Callable[[Fabric], None], errors: Any, *, forked: bool) -> None:
        self.work = work
        self.errors = errors
        self.forked = forked

    def __call__(self, fabric: Fabric) -> None:
        """Do the work."""
        if self.forked:
            torch.set_num_threads(1)  # a forked process must not wait for the OpenMP threads that it did not inherit
        try:
            self.work(fabric)
        except KaruiError as error:
            self.errors.put((type(error), error.message, error.hint))
            raise
