"""A job that its scheduler started again takes the place of its last attempt; another job does not."""

import os
import signal
import subprocess
import sys

import pytest

from pipeline.errors import OwnedError
from pipeline.runtime.owner import acquire
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from pipeline.runtime.owner import acquire
acquire(Path(sys.argv[1]), "job 7")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def zombie(tmp_path):
    """An attempt of job 7 that holds the run directory and is frozen."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()


def test_the_next_attempt_of_the_same_job_goes_on_at_once_and_the_old_one_leaves(zombie, tmp_path):
    ours = acquire(tmp_path, "job 7")
    os.kill(zombie.pid, signal.SIGCONT)
    assert zombie.wait(30) == 1
    ours.check()
    ours.release()


def test_another_job_is_refused_and_told_who_is_there(zombie, tmp_path):
    with pytest.raises(OwnedError, match=f"job 7, process {zombie.pid}"):
        acquire(tmp_path, "job 8")
