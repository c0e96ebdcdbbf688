"""The arithmetic of one optimizer step, from bytes to numbers.

It reads and writes tensors only: no number of Python's changes from step to step, and the host never waits
for the device. So the same function runs eagerly, compiled, and captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cvae.losses import Losses, pack
from pipeline.config.schema import OptimConfig, TrainConfig
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.split import ceil_div, share
from pipeline.training.objectives import Objective
from pipeline.training.optim import Ema, Precision
from pipeline.training.step.flat import FlatWeights

Inputs = tuple[Tensor, Tensor, Tensor]  # x [b, 3, S, S], y [b, A], noise [b, F]
CONTROLS = ("beta", "lr", "pace", "stop")  # KL weight, learning rate, see `Ema.pace`, vote to stop


class StepArithmetic:
    """One optimizer step on the global batch (all ranks); a rank's share may be empty.

    `to_inputs` turns the tensors of a batch on the device into the model's inputs.
    """

    def __init__(
        self,
        objective: Objective,
        forward: nn.Module,
        to_inputs: Callable[[list[Tensor]], Inputs],
        weights: FlatWeights,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        precision: Precision,
        ranks: Ranks,
        train: TrainConfig,
        optim: OptimConfig,
    ) -> None:
        self.objective = objective
        self.forward = forward
        self.to_inputs = to_inputs
        self.weights = weights
        self.optimizer = optimizer
        self.ema = ema
        self.precision = precision
        self.ranks = ranks
        self.scale = ranks.world_size / train.batch_size
        self.n_micro = micro_batches(train, ranks.world_size)
        self.clip_norm = optim.clip_norm
        self.names: tuple[str, ...] = ()  # of the numbers of a step
        # The kernels of a GPU read the learning rate as float32.
        dtype = torch.float32 if ranks.device.type == "cuda" else torch.float64
        self.lr = torch.zeros((), dtype=dtype, device=ranks.device)
        for group in optimizer.param_groups:
            group["lr"] = self.lr

    def __call__(self, batch: list[Tensor], controls: Tensor) -> Tensor:
        """Make the step and return its numbers, float64 [len(self.names)], on the device.

        `batch`: the tensors of a `Batch` on the device. `controls`: float64 [4], see CONTROLS.
        """
        self.lr.copy_(controls[1])
        self.weights.vector.grad.zero_()  # type: ignore[union-attr]
        rounded = controls.to(self.precision.dtype)
        losses, votes = self._gradients(self.to_inputs(batch), rounded[0], controls[3:])
        grad_norm, bad = self._update(losses.values["loss"])
        self.ema.update(rounded[2])
        measured = losses.values | {"grad_norm": grad_norm, "bad": bad, "stop": votes}
        self.names = tuple(measured)
        float64 = [value if value.dtype == torch.float64 else value.double() for value in measured.values()]
        return torch.stack(float64)

    def _gradients(self, inputs: Inputs, beta: Tensor, vote: Tensor) -> tuple[Losses, Tensor]:
        """Run forward and backward passes; return the losses and the number of ranks that wish to stop."""
        votes: list[Tensor] = []

        def reduce_sum(sums: Tensor) -> Tensor:
            """Sum over all ranks in the one all-reduce of a step; the wish to stop rides along."""
            reduced = self.ranks.reduce_sum(torch.cat((sums, vote)))
            votes.append(reduced[-1])
            return reduced[:-1]

        micro = self._cut(inputs)
        reduce: Callable[[Tensor], Tensor] = reduce_sum
        if len(micro) > 1:
            # The first micro-batch's gradient already needs the variance of the whole batch.
            with torch.no_grad(), self.precision.autocast():
                own = torch.stack([pack(self.objective.sums(*part)) for part in micro]).sum(0)
            total = reduce_sum(own)
            reduce = lambda _: total  # noqa: E731

        for i, part in enumerate(micro):
            with self._gradient_sync(i == len(micro) - 1):
                with self.precision.autocast():
                    losses: Losses = self.forward(*part, beta, self.scale, reduce)
                self.precision.scaler.scale(losses.objective).backward()
        return losses, votes[0]

    def rehearse(self, batch: list[Tensor]) -> None:
        """Run the objective forwards and backwards without communication; no weight changes."""
        for part in self._cut(self.to_inputs(batch)):
            with self.precision.autocast():
                sums = self.objective.sums(*part)
            pack(sums)
            torch.stack([value for value in sums.values() if value.requires_grad]).sum().backward()
        self.weights.vector.grad.zero_()  # type: ignore[union-attr]

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and let the optimizer step; return the norm of the gradient, and whether the step was skipped.

        All ranks have the same loss and gradients, so all skip a bad step: on the device, and without asking
        the host.
        """
        scaler, optimizer = self.precision.scaler, self.optimizer
        scaler.unscale_(optimizer)
        grad_norm = self._clip(self.weights.vector.grad)  # type: ignore[arg-type]
        if scaler.is_enabled():
            # A finite loss with infinite gradients is left to the scaler, until its scale is of no use.
            scale = scaler._get_scale_async()  # the public way would ask the host
            assert scale is not None
            bad = ~loss.isfinite() | (~grad_norm.isfinite() & (scale < 1))
            scaler.step(optimizer)
            scaler.update()
            return grad_norm, bad
        bad = ~(loss + grad_norm).isfinite()
        # The fused kernel skips the step if found_inf is 1.
        optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
        return grad_norm, bad

    def _clip(self, gradient: Tensor) -> Tensor:
        """Bound the norm of the gradient; return what it was."""
        norm = torch.linalg.vector_norm(gradient)
        if self.clip_norm:
            gradient.mul_((self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.double()

    def _cut(self, inputs: Inputs) -> list[Inputs]:
        """Cut this rank's share into micro-batches."""
        if self.n_micro == 1:
            return [inputs]
        x, y, noise = inputs
        micro = []
        for i in range(self.n_micro):
            part = share(len(x), i, self.n_micro)
            cut = slice(part.start, part.stop)
            micro.append((x[cut], y[cut], noise[cut]))
        return micro

    def _gradient_sync(self, last: bool) -> AbstractContextManager:
        """Let DDP sum gradients over ranks only in the backward pass of the last micro-batch."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return nullcontext()


def micro_batches(train: TrainConfig, world_size: int) -> int:
    """Return the number of micro-batches, from global numbers only.

    Ranks that disagreed about it would wait for each other forever.
    """
    if not train.micro_batch:
        return 1
    largest_share = ceil_div(train.batch_size, world_size)
    return ceil_div(largest_share, train.micro_batch)
