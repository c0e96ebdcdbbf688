"""Whoever stands still is named and nobody is left; what may take long never counts."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.schema import RunConfig
from pipeline.runtime import watchdog
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.ports import free_port
from pipeline.runtime.watchdog import EXIT_CODE, Watchdog
from pipeline.training.health import complaints
from tests.conftest import ROOT

WORKER = ROOT / "tests" / "workers" / "stalling.py"


def wait_for(condition, limit_s: float = 60.0) -> None:
    give_up = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def start(folder: Path, world: int, mode: str) -> list[subprocess.Popen]:
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
    }
    command = [sys.executable, str(WORKER), str(folder), mode]
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
    return [
        subprocess.Popen(command, env=env | rank, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for rank in ranks
    ]


def test_frozen_and_stuck_ranks_are_named_and_nobody_is_left(tmp_path):
    """Rank 0 is frozen (it holds the store), or another rank, or only the main thread of one is stuck."""
    for name, world, mode, silent in (
        ("first", 3, "freeze0", 0),
        ("last", 3, "freeze2", 2),
        ("stuck", 2, "stick1", 1),
    ):
        folder = tmp_path / name
        folder.mkdir()
        processes = start(folder, world, mode)
        try:
            if mode.startswith("freeze"):
                wait_for(lambda: (folder / "step10").exists())  # noqa: B023
                processes[silent].send_signal(signal.SIGSTOP)
            codes = [process.wait(timeout=90) for process in processes]
        finally:
            for process in processes:
                process.kill()
        errors = "".join(process.stderr.read() for process in processes)
        assert all(codes) and EXIT_CODE in codes, (mode, codes, errors[-2000:])
        assert codes[silent] == (-signal.SIGKILL if mode.startswith("freeze") else codes[silent])
        assert f"no answer for 2 s from rank {silent} (process {processes[silent].pid} on" in errors, (
            mode,
            errors[-2000:],
        )
        assert json.loads((folder / "stall.json").read_text())["ranks"] == [silent]


@pytest.mark.slow  # it waits for a watchdog that must not bite
def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path):
    """`scontrol suspend` stops all ranks for as long as it likes: none of them was silent."""
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        processes = start(folder, world, "brief")
        try:
            wait_for((folder / "step10").exists)
            for number, pause in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 0.0)):
                for process in processes:
                    process.send_signal(number)
                time.sleep(pause)  # longer than the limit, shorter than a collective's own timeout
            codes = [process.wait(timeout=90) for process in processes]
        finally:
            for process in processes:
                process.kill()
        errors = "".join(process.stderr.read() for process in processes)
        assert codes == [0] * world, errors[-2000:]


def test_a_pause_may_take_long_and_a_step_may_not(tmp_path):
    left: list[int] = []
    dog = Watchdog(Ranks(), 0.5, tmp_path, logging.getLogger("test"), left.append)
    with dog:
        for step in range(5):
            dog.at(step)
        with dog.paused():
            time.sleep(1.5)
        assert not left
        dog.at(5)
        wait_for(lambda: left == [EXIT_CODE])


def test_a_store_that_answers_late_makes_no_rank_silent(tmp_path, monkeypatch):
    """On a host without free processors each answer takes 20 s; ranks that report are not accused."""
    clock, rounds, silent = [0.0], iter([False, False, False, True]), []
    dog = Watchdog(Ranks(0, 2), 30, tmp_path, logging.getLogger("test"))

    class BusyStore:
        beats = 0

        def set(self, name, value):
            self.beats += 1

        def multi_get(self, names):
            clock[0] += 20
            silent.extend(dog._silent(clock[0]))  # what the other thread sees before the answer is there
            return [f"{self.beats} {rank}".encode() for rank in range(len(names))]

    def wait(seconds):
        clock[0] += seconds
        return next(rounds)

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    dog._store, dog._end = BusyStore(), SimpleNamespace(wait=wait)
    dog._answered, dog._heard = 0.0, {0: ("", 0.0), 1: ("", 0.0)}
    dog._report_and_listen()
    assert clock[0] > 60 and not silent


def test_the_first_steps_and_no_limit_are_not_watched(tmp_path):
    left: list[int] = []
    for limit, steps in ((0.3, 2), (0.0, 5)):
        with Watchdog(Ranks(), limit, tmp_path, logging.getLogger("test"), left.append) as dog:
            for step in range(steps):
                dog.at(step)
            time.sleep(1.0)
    assert not left


def test_collapses_are_told_with_what_to_change():
    model = RunConfig().model
    good = {
        "val_ema/kl": 40.0,
        "val_ema/active_units": 60,
        "val_ema/s2": 0.02,
        "val_ema/log_det_min": -30.0,
        "val_ema/log_det_max": 40.0,
    }
    assert complaints(good, model) == []
    for change, text in (
        ({"val_ema/active_units": 0}, "KL collapse.*raise train.kl_warmup_images"),
        ({"val_ema/s2": 1.2e-5}, "variance collapse.*model.variance.floor"),
        ({"val_ema/log_det_max": 900.0}, "log-determinant 900.*bound 1024.*model.prior.flow.bound"),
    ):
        (complaint,) = complaints(good | change, model)
        import re

        assert re.search(text, complaint)
