"""The training loop: what happens in one iteration, and when hooks get a say.

before_train; per iteration: before_step, run_step (calls after_backward), after_step; after_train
"""

from __future__ import annotations

import contextvars
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel

from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]


class HookBase:
    """Something to do at certain points of training. Override what you need.

    Attributes:
        trainer: the trainer that the hook is registered with (a weak proxy); ``trainer.iter`` is the current
            iteration.
    """

    trainer: TrainerBase = None  # type: ignore[assignment]  # until it is registered

    def before_train(self) -> None:
        """Once, before the first iteration."""

    def after_train(self) -> None:
        """Once, after the last iteration; also when training ends by an exception."""

    def before_step(self) -> None:
        """Before each iteration."""

    def after_backward(self) -> None:
        """In each iteration, when gradients are there and the optimizer has not used them yet."""

    def after_step(self) -> None:
        """After each iteration."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for this hook; who returns something has ``load_state_dict`` too."""
        return {}


class TrainerBase:
    """A loop over iterations with hooks; says nothing about models, data or optimizers.

    Attributes:
        iter: the current iteration, from ``start_iter`` on; ``max_iter`` after the last one.
        start_iter, max_iter: training runs over ``range(start_iter, max_iter)``.
        storage: the EventStorage that is open during training.
    """

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = 0
        self.start_iter = 0
        self.max_iter: int
        self.storage: EventStorage

    def register_hooks(self, hooks: Sequence[HookBase | None]) -> None:
        """Append hooks; they are called in the order of registration. None entries are left out.

        Raises:
            TypeError: an entry is no HookBase.
        """
        for hook in hooks:
            if hook is None:
                continue
            if not isinstance(hook, HookBase):
                raise TypeError(f"hooks must derive from HookBase, got {type(hook).__name__}.")
            # Weak: trainer and hooks would otherwise keep each other, and the GPU memory behind them, alive.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations ``start_iter`` .. ``max_iter - 1``.

        An exception is logged, ``after_train`` is still called, and the exception goes on to the caller.
        """
        log = logging.getLogger(__name__)
        log.info("Starting training from iteration %d", start_iter)
        self.start_iter = start_iter
        self.iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                while self.iter < max_iter:
                    for phase in (self.before_step, self.run_step, self.after_step):
                        phase()
                    self.iter += 1
            except Exception:
                log.exception("Exception during training, in iteration %d:", self.iter)
                raise
            finally:
                self.after_train()

    def before_train(self) -> None:
        self._call_hooks("before_train")

    def after_train(self) -> None:
        self.storage.iter = self.iter
        self._call_hooks("after_train")

    def before_step(self) -> None:
        # The storage counts with the trainer, so everything that is put during the step has the right
        # iteration.
        self.storage.iter = self.iter
        self._call_hooks("before_step")

    def after_backward(self) -> None:
        self._call_hooks("after_backward")

    def after_step(self) -> None:
        self._call_hooks("after_step")

    def run_step(self) -> None:
        """One iteration; for subclasses."""
        raise NotImplementedError(f"{type(self).__name__} must define run_step().")

    def _call_hooks(self, moment: str) -> None:
        for hook in self._hooks:
            getattr(hook, moment)()

    def state_dict(self) -> dict[str, Any]:
        """``iteration``, the one that was run last; ``hooks``: class name -> state, where there is one."""
        states: dict[str, Any] = {}
        for hook in self._hooks:
            state = hook.state_dict()
            if state:
                states.setdefault(type(hook).__qualname__, state)
        return {"iteration": self.iter, "hooks": states} if states else {"iteration": self.iter}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over iteration and hook states; states of unknown hooks are reported and left."""
        self.iter = state_dict["iteration"]
        registered = {type(hook).__qualname__: hook for hook in reversed(self._hooks)}
        for name, state in state_dict.get("hooks", {}).items():
            if name in registered:
                registered[name].load_state_dict(state)  # type: ignore[attr-defined]
            else:
                logging.getLogger(__name__).warning(
                    "The checkpoint has a state for the hook %s, which is not registered: ignored.", name
                )


class SimpleTrainer(TrainerBase):
    """One model, one loader, one optimizer: forward, backward, step.

    Args:
        model: called with a batch, returns a loss or a dict of losses, which are summed. Put into training
            mode.
        data_loader: iterable of batches, endless or at least ``max_iter`` long.
        optimizer: its ``step`` follows the backward pass.
        gather_metric_period: collect the losses of all processes every so many iterations (it costs a sync).
        zero_grad_before_forward: clear gradients before the forward pass instead of just before the backward
            pass.
        async_write_metrics: write losses from a second thread, so that the loop does not wait for the GPU. A
            loss that is not finite is then noticed one iteration later.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        super().__init__()
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.async_write_metrics = async_write_metrics
        self._batches: Iterator[Any] | None = None
        self._metrics_thread: ThreadPoolExecutor | None = None
        self._metrics_pending: Future[None] | None = None

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        # Made when first used: worker processes start then, after everything else is set up.
        if self._batches is None:
            self._batches = iter(self.data_loader)
        return self._batches

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Replace the loader; the old one is dropped before the new one is built."""
        del self.data_loader
        self._batches = None
        self.data_loader = data_loader_builder()

    def run_step(self) -> None:
        batch, data_time = self._next_batch()
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        losses, total = self._forward(batch)
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        total.backward()
        self.after_backward()
        # Before the optimizer's step: a loss that is not finite must not reach the weights.
        self._record(losses, data_time)
        self.optimizer.step()

    def _next_batch(self) -> tuple[Any, float]:
        """The next batch, and how many seconds it took to get it."""
        if not self.model.training:
            raise RuntimeError(
                f"the model is in eval mode in iteration {self.iter}: a hook or an evaluation left it there. "
                "Call model.train()."
            )
        start = time.perf_counter()
        try:
            batch = next(self._data_loader_iter)
        except StopIteration as err:
            raise RuntimeError(
                f"the data loader ended before iteration {self.iter}; training needs an endless one "
                "(detectron2.data.samplers.TrainingSampler), or a smaller SOLVER.MAX_ITER."
            ) from err
        return batch, time.perf_counter() - start

    def _forward(self, batch: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses by name, and their sum."""
        output = self.model(batch)
        if isinstance(output, torch.Tensor):
            return {"total_loss": output}, output
        return output, sum(output.values())

    def _record(self, losses: Mapping[str, torch.Tensor], data_time: float) -> None:
        if not self.async_write_metrics:
            self._write_metrics(losses, data_time)
            return
        self.wait_for_metrics()
        if self._metrics_thread is None:
            self._metrics_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        # The open EventStorage belongs to this thread's context; the other thread gets a copy of that.
        context = contextvars.copy_context()
        self._metrics_pending = self._metrics_thread.submit(
            context.run, self._write_metrics, losses, data_time, "", self.iter
        )

    def wait_for_metrics(self) -> None:
        """Until metrics that another thread writes are written; raises what went wrong there."""
        pending, self._metrics_pending = self._metrics_pending, None
        if pending is not None:
            pending.result()

    def after_train(self) -> None:
        try:
            super().after_train()
        finally:
            self._end_metrics_thread()

    def _end_metrics_thread(self) -> None:
        thread, self._metrics_thread = self._metrics_thread, None
        if thread is not None:
            thread.shutdown(wait=True)

    def _write_metrics(
        self,
        loss_dict: Mapping[str, torch.Tensor],
        data_time: float,
        prefix: str = "",
        iter: int | None = None,
    ) -> None:
        iteration = self.iter if iter is None else iter
        if (iteration + 1) % self.gather_metric_period == 0:
            SimpleTrainer.write_metrics(loss_dict, data_time, iteration, prefix)

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, torch.Tensor], data_time: float, cur_iter: int, prefix: str = ""
    ) -> None:
        """Average the losses over all processes and put them, their sum ``total_loss``, and ``data_time``
        (the slowest process) into the event storage, on the main process.

        Args:
            loss_dict: scalar tensors by name.
            data_time: seconds this process waited for its batch.
            cur_iter: the iteration they belong to.
            prefix: goes before ``total_loss``.
        Raises:
            FloatingPointError: the sum is not finite; names iteration and losses.
        """
        mine = dict(zip(loss_dict, _as_floats([loss.detach() for loss in loss_dict.values()])))
        everyone = comm.gather((mine, data_time))
        if not comm.is_main_process():
            return
        means = {name: sum(losses[name] for losses, _ in everyone) / len(everyone) for name in mine}
        total = sum(means.values())
        if not math.isfinite(total):
            raise FloatingPointError(
                f"Loss became infinite or NaN at iteration={cur_iter}!\nloss_dict = {means}\n"
                "Usual causes: a learning rate that is too high or not warmed up (SOLVER.BASE_LR, "
                "SOLVER.WARMUP_ITERS), float16 overflow (SOLVER.AMP), bad annotations."
            )
        storage = get_event_storage()
        storage.put_scalar("data_time", max(seconds for _, seconds in everyone), cur_iter=cur_iter)
        storage.put_scalar(f"{prefix}total_loss", total, cur_iter=cur_iter)
        if len(means) > 1:
            for name, value in means.items():
                storage.put_scalar(name, value, cur_iter=cur_iter)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])


def _as_floats(losses: Sequence[torch.Tensor]) -> list[float]:
    """Scalars as numbers, with one transfer to the host where they lie on one device."""
    if len({loss.device for loss in losses}) == 1:
        return torch.stack([loss.reshape(()) for loss in losses]).tolist()
    return [float(loss) for loss in losses]


class AMPTrainer(SimpleTrainer):
    """SimpleTrainer with the forward pass in mixed precision; on CPU as well, in bfloat16.

    Args:
        grad_scaler: scales the loss so that float16 gradients do not vanish; by default a new one, switched
            off where it has no use (bfloat16, CPU).
        precision: dtype of autocast. On CPU float16 becomes bfloat16.
        log_grad_scaler: put the scale into the event storage, as ``[metric]grad_scaler``.
        (The others are those of SimpleTrainer.)
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        if isinstance(model, DataParallel) or len(getattr(model, "device_ids", None) or ()) > 1:
            raise ValueError(
                "AMPTrainer needs one device per process: autocast does not reach DataParallel's threads."
            )
        super().__init__(
            model, data_loader, optimizer, gather_metric_period, zero_grad_before_forward, async_write_metrics
        )
        # Of what trains: parameters that nothing moves, of a frozen network for instance, may lie elsewhere.
        self.device_type = min(model.parameters(), key=lambda p: not p.requires_grad).device.type
        if self.device_type == "cpu" and precision is torch.float16:
            precision = torch.bfloat16
        self.precision = precision
        if grad_scaler is None:
            useful = precision is torch.float16
            grad_scaler = torch.amp.GradScaler(self.device_type, enabled=useful)
        self.grad_scaler = grad_scaler
        self.log_grad_scaler = log_grad_scaler

    def run_step(self) -> None:
        batch, data_time = self._next_batch()
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        with torch.autocast(self.device_type, dtype=self.precision):
            losses, total = self._forward(batch)
        if not self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        self.grad_scaler.scale(total).backward()
        if self.log_grad_scaler:
            get_event_storage().put_scalar("[metric]grad_scaler", self.grad_scaler.get_scale())
        self.after_backward()
        self._record(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Empty: saved with the scaler switched off (CPU, bfloat16); the scale then starts anew.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
