"""How the arithmetic of a step runs (`train.step`): eagerly, compiled, or captured as one CUDA graph.

All ways make the same communication in the same order, so it does not matter if ranks differ in them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.config.schema import TrainConfig
from pipeline.data.loader import Batch
from pipeline.errors import ConfigError
from pipeline.training.step.arithmetic import CONTROLS, StepArithmetic

WARM_UP = 11  # eager steps before a capture: DDP's documented number
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
NEVER = 10**12  # eager steps before another try
StepRunner = Callable[[Batch, list[float]], Tensor]  # batch and controls -> numbers of the step


class EagerStep:
    """Runs the arithmetic operation by operation. A compiled objective makes these operations few."""

    def __init__(self, arithmetic: StepArithmetic, device: torch.device) -> None:
        self.arithmetic = arithmetic
        self.device = device

    def __call__(self, batch: Batch, controls: list[float]) -> Tensor:
        """Make one step; see `StepArithmetic`."""
        tensors = [tensor.to(self.device, non_blocking=True) for tensor in batch[1:]]
        on_host = torch.tensor(controls, dtype=torch.float64)
        return self.arithmetic(tensors, on_host.to(self.device, non_blocking=True))


class GraphedStep:
    """Runs WARM_UP steps on buffers that never move, captures the next one, and replays it from then on.

    Every step counts: also the first ones train. `capture` records what a function does on the device and
    returns a function that does it again, and the tensor that then holds the result. If a single rank cannot
    capture, steps stay eager with `may_stay_eager`; otherwise ConfigError tells what to set.
    """

    def __init__(
        self,
        arithmetic: StepArithmetic,
        device: torch.device,
        capture: Capture,
        may_stay_eager: bool,
        log: logging.Logger,
    ) -> None:
        self.arithmetic = arithmetic
        self.capture = capture
        self.may_stay_eager = may_stay_eager and arithmetic.ranks.world_size == 1
        self.log = log
        self.controls = torch.zeros(len(CONTROLS), dtype=torch.float64, device=device)
        self.buffers: list[Tensor] = []
        self.eager_left = WARM_UP
        self.replay: Callable[[], object] | None = None
        self.numbers = self.controls

    def __call__(self, batch: Batch, controls: list[float]) -> Tensor:
        """Make one step; see `StepArithmetic`."""
        self._load(batch, controls)
        step = partial(self.arithmetic, self.buffers, self.controls)
        if self.eager_left:
            self.eager_left -= 1
            return step()
        if self.replay is None and not self._captured(step):
            self.eager_left = NEVER
            return step()
        assert self.replay is not None
        self.replay()
        return self.numbers.clone()  # the next step writes over them

    def _captured(self, step: Callable[[], Tensor]) -> bool:
        """Capture `step`, which does not run by that. Raises ConfigError."""
        try:
            self.replay, self.numbers = self.capture(step)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            if not self.may_stay_eager:
                raise ConfigError(
                    f"key 'train.step': the step could not be captured ({reason}); set train.step=eager"
                ) from error
            self.log.warning("steps run eager from now on: the step could not be captured (%s)", reason)
        return self.replay is not None

    def _load(self, batch: Batch, controls: list[float]) -> None:
        tensors = batch[1:]
        if not self.buffers:
            self.buffers = [torch.empty_like(tensor, device=self.controls.device) for tensor in tensors]
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self.controls.copy_(torch.tensor(controls, dtype=torch.float64), non_blocking=True)


def capture_in_cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record `step` on the current stream, on which it must have run before (all ranks)."""
    graph = torch.cuda.CUDAGraph()
    # The prefetch thread goes on to allocate page-locked memory, which other modes would forbid.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        numbers = step()
    return graph.replay, numbers


def use_side_stream(device: torch.device) -> None:
    """Leave the default stream for good: a graph cannot be captured on it, nor hold work that began there.

    DDP, the nodes that gather gradients, the eager steps and the capture must share one stream.
    """
    if device.type != "cuda":
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_stream(stream)


def obstacle_to_graph(arithmetic: StepArithmetic, device: torch.device) -> str:
    """Return why the step cannot be captured in a CUDA graph; "" if it can."""
    if device.type != "cuda":
        return "there is no GPU"
    if arithmetic.precision.scaler.is_enabled():
        return "fp16 scales its gradients with the help of the host"
    if not all(group.get("capturable") for group in arithmetic.optimizer.param_groups):
        return "the optimizer is not capturable"
    return ""


def obstacle_to_compiling(device: torch.device) -> str:
    """Return why torch.compile cannot work here; "" if it can."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers if compiler):
        return "torch.compile needs a C++ compiler (g++ or clang++, or $CXX)"
    return ""


def fastest(arithmetic: StepArithmetic, device: torch.device) -> tuple[str, str]:
    """Return the fastest way that holds for this configuration, and why (the same on all ranks)."""
    if device.type == "cuda":
        obstacle = obstacle_to_graph(arithmetic, device)
        return ("eager", obstacle) if obstacle else ("graph", "one launch for the whole step")
    return "eager", "compiling takes minutes on a CPU; train.step=compiled is worth it in a long training"


def choose_step(
    arithmetic: StepArithmetic, blank: Batch, device: torch.device, train: TrainConfig, log: logging.Logger
) -> StepRunner:
    """Return the runner that `train.step` asks for (all ranks). `blank` has the shapes of a batch.

    Raises ConfigError if the configuration asks for a way that does not hold; `auto` falls back to eager.
    """
    name, why = train.step, "train.step asks for it"
    if name == "auto":
        name, why = fastest(arithmetic, device)
    obstacle = ""
    if name == "graph":
        obstacle = obstacle_to_graph(arithmetic, device)
    elif name == "compiled":
        obstacle = obstacle_to_compiling(device) or compile_objective(arithmetic, blank, device)
    if obstacle and train.step != "auto":
        raise ConfigError(f"key 'train.step': {name} is not possible: {obstacle}; use auto or eager")
    if obstacle:
        name, why = "eager", obstacle
    log.info("steps run %s: %s", name, why)
    if name == "graph":
        return GraphedStep(arithmetic, device, capture_in_cuda_graph, train.step == "auto", log)
    return EagerStep(arithmetic, device)


def compile_objective(arithmetic: StepArithmetic, blank: Batch, device: torch.device) -> str:
    """Compile the forward and backward pass of the objective and try it; return why it failed, or "".

    All ranks take part, and all fall back if one fails.
    """
    objective = arithmetic.objective
    as_written = objective.sums
    objective.sums = torch.compile(as_written, dynamic=False)  # type: ignore[method-assign]
    failure = ""
    try:
        arithmetic.rehearse([tensor.to(device) for tensor in blank[1:]])
    except Exception as error:  # whatever a compiler may raise
        failure = f"torch.compile failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    failed = arithmetic.ranks.reduce_sum(torch.tensor([float(bool(failure))], device=device))
    if not failed.item():
        return ""
    objective.sums = as_written  # type: ignore[method-assign]
    return failure or "torch.compile failed on another rank"
