"""Several real processes of one group. They are forked from a server that has imported torch already.

To start Python and to import torch takes seconds, and the tests start some hundred ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.runtime.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._inductor", "pipeline.run", "pipeline.training.loop", "pipeline.stages.eval", "sklearn.manifold"]
)


def _rank(script: str, args: list[str], env: dict[str, str], out: str, err: str) -> None:
    """Be one rank: `script` as a program, with its output in files."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY), stream)
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


def run_ranks(
    script: Path, args: list[str], world_size: int, timeout_s: int = 240
) -> list[subprocess.CompletedProcess]:
    """Run `script` on `world_size` ranks of one group; every one must end well."""
    env = dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [[f"{folder}/{stream}{rank}" for stream in ("out", "err")] for rank in range(world_size)]
        ranks = []
        for rank, streams in enumerate(files):
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for file in streams:
                Path(file).touch()
            asked = {"ASKED": (str(script), args, own, *streams)}
            # By its path, since another package in the environment may be called `tests` too.
            ranks.append(SERVER.Process(target=runpy.run_path, args=(__file__, asked, "rank"), daemon=True))
        give_up = time.monotonic() + timeout_s
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(max(0.0, give_up - time.monotonic()))
        finally:
            for process in ranks:
                if process.pid:
                    process.kill()
        for process in ranks:
            process.join()
        said = [[Path(stream).read_text() for stream in streams] for streams in files]
        done = [
            subprocess.CompletedProcess([str(script), *args], process.exitcode, *streams)
            for process, streams in zip(ranks, said, strict=True)
        ]
    for process in done:
        assert process.returncode == 0, process.stderr[-3000:]
    return done


if __name__ == "rank":
    _rank(*ASKED)  # type: ignore[name-defined]  # noqa: F821
