"""The faults: how each strikes, how the ranks must then end, and what is repaired."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.dev.chaos_parts.trial import Trial

FROZEN_S = 1.0


class WrongEnd(AssertionError):
    """The ranks did not end as the fault demands."""


@dataclass(frozen=True)
class Fault:
    """One fault: `strike`, then `expect` checks how the ranks ended, then `mend` and a restart.

    `between` acts after the ranks have ended. At most `intervals` checkpoint intervals may be lost.
    """

    strike: Callable[[Trial], None]
    expect: Callable[[Trial, list[int]], None]
    mend: Callable[[Trial], None] = lambda trial: None
    between: Callable[[Trial], None] | None = None
    refused: str = ""  # until `mend`, the restart must be refused with this text
    intervals: float = 1
    overrides: tuple[str, ...] = ()
    earliest: int = 1  # first step at which it may strike
    latest_from_end: int = 1
    mount: bool = False  # the run directory is a separate small file system


def require(condition: bool, what: str, trial: Trial) -> None:
    """Raise WrongEnd with `what` and the end of the logs unless `condition` holds."""
    if not condition:
        raise WrongEnd(f"{what}\n{trial.group.tail()}")


def kill_one(trial: Trial) -> None:
    """Send SIGKILL to one rank."""
    trial.group.signal(trial.rank, signal.SIGKILL)


def all_gone(trial: Trial, codes: list[int]) -> None:
    """Require that the killed rank ended by its signal and its peers with an error."""
    require(codes[trial.rank] == -signal.SIGKILL and all(codes), f"exit codes {codes}", trial)


def ask(number: int) -> Callable[[Trial], None]:
    """Return a fault that sends a stop signal to one or more ranks."""

    def strike(trial: Trial) -> None:
        count = trial.random.randint(1, trial.world)
        chosen = trial.random.sample(range(trial.world), count)
        for rank in chosen:
            trial.group.signal(rank, number)

    return strike


def all_stopped(trial: Trial, codes: list[int]) -> None:
    """Require that every rank stopped in order, or that training had ended when the signal came."""
    ended = codes == [0] * trial.world and (trial.run_dir / "train" / "done.json").exists()
    stopped = codes == [128 + signal.SIGTERM] * trial.world
    require(ended or stopped, f"exit codes {codes}", trial)


def fill_disk(trial: Trial) -> None:
    """Fill the run's file system to the last byte.

    Without the right to mount one, limit the file size of rank 0.
    """
    if not trial.mounted:
        resource.prlimit(trial.group.pids[0], resource.RLIMIT_FSIZE, (4096, 4096))
        return
    with suppress(OSError), open(trial.run_dir / "ballast", "wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while ballast.write(bytes(size)) == size:
                    pass


def make_room(trial: Trial) -> None:
    """Remove the ballast."""
    (trial.run_dir / "ballast").unlink(missing_ok=True)


def storage_error(trial: Trial, codes: list[int]) -> None:
    """Require that rank 0 names the file that it could not write, and that its peers leave too."""
    require(codes[0] == 2 and all(codes), f"exit codes {codes}", trial)
    require(
        "could not be written" in trial.group.text(),
        "the error does not say what could not be written",
        trial,
    )


def read_only(trial: Trial) -> None:
    """Make the folder of checkpoints read-only."""
    trial.checkpoints.chmod(0o555)


def writable(trial: Trial) -> None:
    """Make the folder of checkpoints writable again."""
    trial.checkpoints.chmod(0o755)


def newest(trial: Trial) -> Path:
    """Return the tensors or the JSON of the newest checkpoint."""
    step = max(trial.durable_steps())
    suffix = trial.random.choice(["safetensors", "json"])
    return trial.checkpoints / f"step_{step:08d}.{suffix}"


def truncate(file: Path, rng: random.Random) -> None:
    """Cut the file at a random byte."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip(file: Path, rng: random.Random) -> None:
    """Flip one random bit of the file."""
    at = rng.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ (1 << rng.randrange(8))]))


def damage_newest(how: Callable[[Path, random.Random], None]) -> Callable[[Trial], None]:
    """Return a fault that damages one file of the newest checkpoint."""
    return lambda trial: how(newest(trial), trial.random)


def shard(trial: Trial) -> Path:
    """Return the shard to damage, never one of the test split: training does not read those."""
    tars = sorted(trial.shards.glob("*.tar"))
    candidates = [tar for tar in tars if not tar.name.startswith("test")]
    return random.Random(trial.seed).choice(candidates)


def remove_shard(trial: Trial) -> None:
    """Remove a shard and keep a copy."""
    shutil.copy2(shard(trial), trial.folder / "kept.tar")
    trial.hurt = shard(trial)
    trial.hurt.unlink()


def flip_shard(trial: Trial) -> None:
    """Flip a bit of a shard and keep a copy."""
    shutil.copy2(shard(trial), trial.folder / "kept.tar")
    trial.hurt = shard(trial)
    flip(trial.hurt, trial.random)


def restore_shard(trial: Trial) -> None:
    """Put the copy back."""
    assert trial.hurt is not None
    os.replace(trial.folder / "kept.tar", trial.hurt)


def change_times(trial: Trial) -> None:
    """Give shards, configuration and checkpoints random times, in the past and in the future."""
    files = [*trial.shards.glob("*"), *trial.checkpoints.glob("*"), trial.run_dir / "config.yaml"]
    for file in files:
        with suppress(FileNotFoundError):  # training has just deleted this checkpoint
            accessed = trial.random.randrange(1 << 61)
            modified = trial.random.randrange(1 << 61)
            os.utime(file, ns=(accessed, modified))


def times_and_kill(trial: Trial) -> None:
    """Change times under a running training, then kill a rank."""
    change_times(trial)
    kill_one(trial)


def freeze(trial: Trial) -> None:
    """Send SIGSTOP to a rank.

    A rank without peers continues after a second, because nobody notices it.
    """
    trial.group.signal(trial.rank, signal.SIGSTOP)
    if trial.world == 1:
        time.sleep(FROZEN_S)
        trial.group.signal(0, signal.SIGCONT)


def named(trial: Trial, codes: list[int]) -> None:
    """Require that a peer named the frozen rank and that no rank is left."""
    if trial.world == 1:
        require(codes == [0], f"exit codes {codes}", trial)
        return
    require(codes[trial.rank] == -signal.SIGKILL and all(codes), f"exit codes {codes}", trial)
    require(
        f"from rank {trial.rank} (process {trial.group.pids[trial.rank]} on" in trial.group.text(),
        "the rank is not named",
        trial,
    )


def second_launch(trial: Trial) -> None:
    """Launch the same run a second time while the first one is paused.

    It must be refused and name the owner.
    """
    for rank in range(trial.world):
        trial.group.signal(rank, signal.SIGSTOP)
    second = trial.launch_again()
    codes = second.wait(trial.limit_s)
    for rank in range(trial.world):
        trial.group.signal(rank, signal.SIGCONT)
    require(codes == [2] * trial.world, f"exit codes of the second launch {codes}", trial)
    text = second.text()
    require(
        f"is being trained by process {trial.group.pids[0]} on" in text,
        f"the owner is not named: {text[-500:]}",
        trial,
    )


def unharmed(trial: Trial, codes: list[int]) -> None:
    """Require that training ended as if nothing had happened."""
    require(codes == [0] * trial.world, f"exit codes {codes}", trial)


def stop_server(trial: Trial) -> None:
    """Send SIGKILL to the MLflow server."""
    assert trial.server is not None
    trial.server.stop()


FAULTS: dict[str, Fault] = {
    "SIGKILL to a rank": Fault(kill_one, all_gone),
    "SIGTERM": Fault(ask(signal.SIGTERM), all_stopped, intervals=0, latest_from_end=4),
    "SIGUSR2": Fault(ask(signal.SIGUSR2), all_stopped, intervals=0, latest_from_end=4),
    "full disk": Fault(fill_disk, storage_error, make_room, latest_from_end=6, mount=True),
    "read-only checkpoints": Fault(read_only, storage_error, writable, earliest=6, latest_from_end=6),
    "newest checkpoint truncated": Fault(
        kill_one, all_gone, between=damage_newest(truncate), intervals=1.5, earliest=11
    ),
    "newest checkpoint, one bit": Fault(
        kill_one, all_gone, between=damage_newest(flip), intervals=1.5, earliest=11
    ),
    "shard removed": Fault(
        kill_one,
        all_gone,
        restore_shard,
        between=remove_shard,
        refused="is listed in manifest.json but cannot be read",
    ),
    "shard, one bit": Fault(
        kill_one, all_gone, restore_shard, between=flip_shard, refused="its sha256 differs from manifest.json"
    ),
    "MLflow server stopped": Fault(stop_server, unharmed, intervals=0),
    "rank frozen": Fault(freeze, named, overrides=("train.stall_s=4",), earliest=4),
    "file times changed": Fault(times_and_kill, all_gone),
    "second launch": Fault(second_launch, unharmed, intervals=0, latest_from_end=8),
}


def can_mount() -> bool:
    """Tell whether this process may mount a tmpfs."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def mount(folder: Path, megabytes: int) -> bool:
    """Mount a small tmpfs on `folder`. Returns False if that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0755", "tmpfs", str(folder)]
    return can_mount() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    """Undo `mount`."""
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)
