"""The process group: which rank this is, on which device, and the few collectives that stages use."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
SWITCH_INTERVAL_S = 2e-4


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; a world_size of 1 needs no process group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes what is shared."""
        return self.rank == 0

    def reduce_sum(self, x: Tensor) -> Tensor:
        """Return the float64 sum of `x` over all ranks, on every rank (all ranks take part).

        No gradient flows through it.
        """
        if self.world_size == 1:
            return x.detach().double()
        x = x.detach().to(torch.float64, copy=True)
        dist.all_reduce(x)
        return x

    def gather_rows(self, x: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order, on every rank (all ranks take part).

        Ranks may have different numbers of rows, also none.
        """
        if self.world_size == 1:
            return x
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=x.device)
        counts[self.rank] = len(x)
        dist.all_reduce(counts)
        longest = int(counts.max())
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)])

    def text_from_main(self, text: str) -> str:
        """Return rank 0's `text` on every rank (all ranks take part)."""
        if self.world_size == 1:
            return text
        own = text.encode() if self.is_main else b""
        length = torch.tensor([len(own)], device=self.device)
        dist.broadcast(length, 0)
        size = int(length)
        if not size:
            return ""
        content = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self.is_main:
            content.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def set_timeout(self, seconds: float) -> None:
        """Set how long a collective waits for a rank from now on (all ranks)."""
        if self.world_size > 1:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))  # torch has no public way

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def _env(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise UserError(
            f"environment variable {name}: got {value!r}, expected a whole number (set by torchrun)"
        )
    return int(value)


def tune_process() -> None:
    """Set what every stage gains from, for this process."""
    # No file of a stage may be written by everybody.
    os.umask(os.umask(0o077) | 0o002)
    # The GIL changes hands after 0.2 ms. Within Python's 5 ms a prefetch thread would prepare whole batches
    # while the main thread waits for it after every operation.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # glibc keeps freed blocks of up to 32 MB. A step on the CPU allocates and frees the same tensors again
    # and again, and the kernel would clear every page anew.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def process_group(timeout_s: int, threads: int = 0) -> Iterator[Ranks]:
    """Join the process group inside the `with` block: nccl on GPUs, gloo on CPUs (all ranks).

    Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `timeout_s`: longest wait for a rank.
    `threads`: CPU threads of this rank; 0 gives it an even share of the node's cores.
    """
    rank = _env("RANK", 0)
    world_size = _env("WORLD_SIZE", 1)
    local_rank = _env("LOCAL_RANK", 0)
    local_world = max(1, _env("LOCAL_WORLD_SIZE", world_size))
    even_share = max(1, len(os.sched_getaffinity(0)) // local_world)
    torch.set_num_threads(threads or even_share)
    tune_process()
    device = _device(local_rank)
    if world_size > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
    try:
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A job that sees one GPU per rank calls it 0; a job that sees the whole node picks by local rank.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
