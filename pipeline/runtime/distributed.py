"""The process group: which rank this is, on which device, and the few collectives that the stages use."""

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

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; world_size 1 needs no process group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Rank 0 writes what is shared."""
        return self.rank == 0

    def reduce_sum(self, x: Tensor) -> Tensor:
        """Sum of a float64 tensor over all ranks, on every rank (all ranks take part); no gradient flows through it."""
        x = x.detach().to(torch.float64, copy=True)
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather_rows(self, x: Tensor) -> Tensor:
        """Rows of all ranks in rank order, on every rank (all ranks take part); row counts may differ, also be 0."""
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
        """Rank 0's `text`, on every rank (all ranks take part)."""
        if self.world_size == 1:
            return text
        content = (
            torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)
            if self.is_main and text
            else None
        )
        length = torch.tensor([0 if content is None else len(content)], device=self.device)
        dist.broadcast(length, 0)
        if not int(length):
            return ""
        content = (
            torch.empty(int(length), dtype=torch.uint8, device=self.device) if content is None else content
        )
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def set_timeout(self, seconds: float) -> None:
        """How long a collective waits for a rank from now on (all ranks); torch has no public way."""
        if self.world_size > 1:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))

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
    """Settings of this process that every stage gains from.

    glibc keeps freed blocks of up to 32 MB: a step on the CPU allocates and frees the same tensors again and again, and the kernel
    would clear every page anew. The GIL changes hands after 0.2 ms: within Python's 5 ms a prefetch thread prepares whole batches
    while the main thread waits for it after every operation. No file is made that everybody may write.
    """
    os.umask(os.umask(0o077) | 0o002)
    sys.setswitchinterval(2e-4)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def process_group(timeout_s: int, threads: int = 0) -> Iterator[Ranks]:
    """Join the group described by RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; leave it at the end.

    nccl on GPUs, gloo on CPUs. `threads`: CPU threads of this rank, 0 for an even share of the node's cores.
    """
    rank, world_size, local_rank = _env("RANK", 0), _env("WORLD_SIZE", 1), _env("LOCAL_RANK", 0)
    local_world = _env("LOCAL_WORLD_SIZE", world_size)
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // max(1, local_world)))
    tune_process()
    if torch.cuda.is_available():
        # A job that sees one GPU per rank numbers it 0; one that sees the whole node picks by local rank.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=device_id)
    try:
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
