"""One run of the loop on one device: steps, turns, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from karui.data import Batches
from karui.errors import DivergedError, TrainingError, require
from karui.model import Task, taps
from karui.train import checkpoint
from karui.train.forward import Forward
from karui.train.influence import Influence
from karui.train.progress import bar
from karui.train.randomness import generator, reseed
from karui.train.training import Training, parameter_groups
from karui.train.turn import Turn

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides a training, and where it leaves its state."""

    module: nn.Module
    task: Task | None
    batches: Batches
    training: Training
    seed: int
    influence: Influence
    turns: tuple[Turn, ...]
    checkpoint: Path | None
    outcome: Path
    label: str
    progress: bool


@dataclass
class Standing:
    """Where a training stands: steps done, the epoch's sums so far, and the learning curve of the epochs before."""

    step: int = 0
    loss: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False


class Run:
    """A job on the way: called with a Fabric, it trains the job's module in place."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.standing = Standing()
        self.dropped = 0

    def __call__(self, fabric: Fabric) -> None:
        """Train to the end, from the checkpoint if there is one."""
        job = self.job
        self.fabric = fabric
        if fabric.world_size > 1:
            _unshare(job.module)
        home = next((p.device for p in job.module.parameters()), torch.device("cpu"))
        with taps(job.module, job.influence.taps) as seen:
            self._prepare(Forward(job.module, job.turns, job.task, job.influence, seen))
            if not self.standing.finished:
                self._train()
        job.module.to(home)
        if fabric.world_size > 1 and fabric.is_global_zero:
            checkpoint.write(job.outcome, checkpoint.module_tensors(job.module), self.facts())

    def facts(self) -> dict[str, Any]:
        """What the note tells of the run."""
        facts: dict[str, Any] = {"history": self.standing.history}
        if self.dropped:
            few = "batch normalisation needs at least two samples on each device"
            reason = few if self.smallest == 2 else "each device needs a sample"
            facts["left out"] = f"the last {self.dropped} samples of each epoch's order: {reason}"
        return facts

    def _prepare(self, forward: Forward) -> None:
        job, training = self.job, self.job.training
        self.forward = forward
        job.module.train()
        self.parameters = list(job.module.parameters())
        made = [self._optimizer(turn) for turn in job.turns]
        self.owned = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in made]
        self.rates = [(turn.optimizer or training.optimizer).lr for turn in job.turns]
        self.wrapped, *self.optimizers = self.fabric.setup(forward, *made)
        self.data = [job.batches if turn.data is None else Batches(turn.data) for turn in job.turns]
        self.smallest = 2 if _normalises_batches(job.module) else 1
        self.per_epoch = len(list(self._batches(0)))
        require(
            self.per_epoch > 0,
            f"'{job.label}' has {len(job.batches)} samples, too few for a step on {self.fabric.world_size} device(s).",
            "Give more data (batch normalisation needs at least two samples a step on each device).",
            TrainingError,
        )
        self.steps = self.per_epoch * training.epochs
        self._resume()

    def _optimizer(self, turn: Turn) -> torch.optim.Optimizer:
        training = self.job.training
        settings = turn.optimizer or training.optimizer
        moved = [p for p in turn.parameters(self.job.module) if p.requires_grad]
        require(
            len(moved) > 0,
            f"Turn '{turn.name}' of '{self.job.label}' has no parameter to train.",
            "Set requires_grad on what is to be trained.",
            TrainingError,
        )
        decay = getattr(settings, "weight_decay", 0.0)
        return settings.make(parameter_groups(self.job.module, moved, decay, training.decay_all))

    def _batches(self, epoch: int) -> Iterator[Int[Tensor, "batch"]]:
        """This process's part of each batch of an epoch; all processes get parts of one size."""
        size, world = self.job.training.batch_size, self.fabric.world_size
        order = torch.randperm(len(self.job.batches), generator=generator(self.job.seed, "order", epoch))
        for chunk in order.split(size * world):
            part = len(chunk) // world
            if part < self.smallest:
                self.dropped = len(chunk)
                continue
            yield chunk[self.fabric.global_rank * part : (self.fabric.global_rank + 1) * part]

    def _train(self) -> None:
        standing, training = self.standing, self.job.training
        self.saved = time.monotonic()
        with bar(
            self.job.label,
            self.steps,
            training.epochs,
            shown=self.job.progress and self.fabric.is_global_zero,
            done=standing.step,
        ) as report:
            self._save(due=0.0)
            for epoch in range(standing.step // self.per_epoch, training.epochs):
                done = standing.step - epoch * self.per_epoch
                for index in list(self._batches(epoch))[done:]:
                    loss = self._step(index, epoch)
                    report(standing.step, epoch, loss)
                    standing.step += 1
                    self._save(due=training.checkpoint_seconds)
                self._end_epoch()
        if not self._is_good():
            self._stop("weights", "not finite", training.epochs - 1)
        standing.finished = True
        self._save(due=0.0)

    def _end_epoch(self) -> None:
        standing = self.standing
        standing.history.append(
            {"loss": standing.loss / max(1, standing.samples), "seconds": round(standing.seconds, 3)}
        )
        standing.loss, standing.samples, standing.seconds = 0.0, 0, 0.0

    def _step(self, index: Int[Tensor, "batch"], epoch: int) -> float:
        """Each turn that is due, on this batch or on data of its own; the loss of the first of them."""
        began, job, step = time.monotonic(), self.job, self.standing.step
        reseed(job.seed, "step", step, self.fabric.global_rank)
        rates = job.training.schedule.factor(step, self.steps)
        batch = self._fetch(job.batches, index)
        if job.training.augment is not None:
            inputs, targets = batch
            draw = generator(job.seed, "augment", step, self.fabric.global_rank)
            batch = ((job.training.augment(inputs[0], draw), *inputs[1:]), targets)
        losses = []
        for number, turn in enumerate(job.turns):
            if turn.is_due(step, self.per_epoch):
                for group in self.optimizers[number].param_groups:
                    group["lr"] = self.rates[number] * rates
                for update in range(turn.updates):
                    own = batch if turn.data is None else self._draw(number, step, update)
                    losses.append(self._update(number, own, epoch))
        loss = losses[0] if losses else 0.0
        self.standing.loss += loss * len(index)
        self.standing.samples += len(index)
        self.standing.seconds += time.monotonic() - began
        return loss

    def _fetch(self, batches: Batches, index: Int[Tensor, "batch"]) -> tuple[tuple[Any, ...], Any]:
        batch = batches.fetch(index)
        return batch if self.fabric.device.type == "cpu" else self.fabric.to_device(batch)

    def _draw(self, number: int, step: int, update: int) -> tuple[tuple[Any, ...], Any]:
        """A batch of a turn's own data, at random."""
        data = self.data[number]
        draw = generator(self.job.seed, "draw", number, step, update, self.fabric.global_rank)
        return self._fetch(data, torch.randperm(len(data), generator=draw)[: self.job.training.batch_size])

    def _update(self, number: int, batch: tuple[tuple[Any, ...], Any], epoch: int) -> float:
        """One update of a turn's parameters; its loss, averaged over the processes."""
        position = {
            "step": self.standing.step,
            "steps": self.steps,
            "epoch": epoch,
            "epochs": self.job.training.epochs,
        }
        loss = self.wrapped(number, *batch, position)
        value = float(self._averaged(loss.detach()))
        if not math.isfinite(value):
            self._stop("loss", str(value), epoch)
        require(
            loss.requires_grad,
            f"The loss of turn '{self.job.turns[number].name}' depends on no parameter.",
            "Let its objective use the module it is given, with gradient.",
            TrainingError,
        )
        self.fabric.backward(loss)
        if len(self.optimizers) > 1:
            self._drop_foreign(number)
        if self.job.training.clip_norm is not None:
            self.fabric.clip_gradients(
                self.wrapped, self.optimizers[number], max_norm=self.job.training.clip_norm, error_if_nonfinite=False
            )
        self.optimizers[number].step()
        assert self.forward.moment is not None  # noqa: S101  (the update has just been computed)
        with torch.no_grad():
            self.job.influence.constraints(self.job.module, self.forward.moment)
        for parameter in self.parameters:
            parameter.grad = None
        return value

    def _averaged(self, loss: Tensor) -> Tensor:
        """The mean over the processes; all of them then see a loss that is not finite, and stop together."""
        if self.fabric.world_size == 1:
            return loss
        averaged = self.fabric.all_reduce(loss, reduce_op="mean")
        assert isinstance(averaged, Tensor)  # noqa: S101  (a tensor was given)
        return averaged

    def _drop_foreign(self, number: int) -> None:
        own = {id(p) for p in self.owned[number]}
        for parameter in self.parameters:
            if id(parameter) not in own:
                parameter.grad = None

    def _stop(self, what: str, became: str, epoch: int) -> NoReturn:
        job, rate = self.job, self.rates[0]
        kept = f" The last good state is in {job.checkpoint}." if job.checkpoint else ""
        raise DivergedError(
            f"The {what} of '{job.label}' became {became} in epoch {epoch + 1} of {job.training.epochs}, step "
            f"{min(self.standing.step + 1, self.steps)} of {self.steps}.{kept}",
            f"Lower the learning rate (it is {rate}), set clip_norm, or check the data for values that are not finite.",
        )

    def _save(self, *, due: float) -> None:
        """Write a checkpoint if the last one is `due` seconds old, and the state is good."""
        job = self.job
        if job.checkpoint is None or not self.fabric.is_global_zero or time.monotonic() - self.saved < due:
            return
        if not self._is_good():
            return  # the next step will stop; the last good state must not be replaced
        tensors = checkpoint.module_tensors(job.module)
        if not self.standing.finished:
            tensors |= checkpoint.optimizer_tensors(self._bare())
        checkpoint.write(job.checkpoint, tensors, dataclasses.asdict(self.standing))
        self.saved = time.monotonic()

    def _is_good(self) -> bool:
        """Whether all weights are finite (buffers may hold infinities, for example the mask of an attention)."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters)

    def _resume(self) -> None:
        job = self.job
        if job.checkpoint is None or not job.checkpoint.exists():
            return
        tensors, facts = checkpoint.read(job.checkpoint)
        self.standing = Standing(**facts)
        checkpoint.restore(tensors, job.module, () if self.standing.finished else self._bare())

    def _bare(self) -> Sequence[torch.optim.Optimizer]:
        return [optimizer.optimizer for optimizer in self.optimizers]


def _normalises_batches(module: nn.Module) -> bool:
    """Whether there is batch normalisation: a layer of it, or, where a graph computes it, its running statistics."""
    statistics = any(name.endswith("running_mean") for name, _ in module.named_buffers())
    return statistics or any(isinstance(layer, _BatchNorm) for layer in module.modules())


def _unshare(module: nn.Module) -> None:
    """Give each process tensors of its own: a module sent to a new process lies in memory that all of them write."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_shared():
            tensor.data = tensor.data.clone()
