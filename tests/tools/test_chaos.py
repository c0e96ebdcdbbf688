"""The chaos harness: trials, the report of a broken promise, and processes that must not stay."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tools.dev import chaos
from tools.dev.chaos_parts import ranks
from tools.dev.chaos_parts.faults import FAULTS
from tools.dev.chaos_parts.processes import PROC
from tools.dev.chaos_parts.trial import Outcome, Trial

STAND_IN = """
import subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""
HOLDER = """
import os, pathlib, signal, sys
sys.path.insert(0, ".")
from tools.dev.chaos_parts.processes import descendants, end_descendants
from tools.dev.chaos_parts.server import Server
def stand_in(folder, port):
    return [sys.executable, "-c", sys.argv[2], str(port)]
def show():
    print(*descendants(os.getpid()), flush=True)
folder = pathlib.Path(sys.argv[1]) / "server"
"""


def run_chaos(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/dev/chaos.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570)


def is_running(pid: int) -> bool:
    try:
        state = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for_end(pids: list[int]) -> list[int]:
    give_up = time.monotonic() + 10
    left = pids
    while left and time.monotonic() < give_up:
        left = [pid for pid in left if is_running(pid)]
        time.sleep(0.02)
    return left


@pytest.mark.slow
def test_one_trial_of_each_fault(tmp_path):
    outcomes_file = tmp_path / "outcomes.json"
    folder = tmp_path / "chaos"
    words = ["--trials", str(len(FAULTS)), "--worlds", "2"]
    done = run_chaos(*words, "--folder", str(folder), "--json", str(outcomes_file))
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    outcomes = json.loads(outcomes_file.read_text())
    assert {o["kind"] for o in outcomes} == set(FAULTS)
    assert not any(o["error"] for o in outcomes)
    assert {o["kind"] for o in outcomes if o["refusals"]} == {"shard removed", "shard, one bit"}
    assert not list(folder.glob("trial*"))


def test_a_broken_promise_is_printed_last_with_all_that_is_needed_to_repeat_it(tmp_path):
    """The trial's seed differs from the undisturbed run's, so it has other samples, metrics and weights."""
    script = f"""
import sys
sys.path.insert(0, ".")
import tools.dev.chaos as chaos
from tools.dev.chaos_parts.trial import Trial
prepare = Trial.prepare
def prepare_with_another_seed(self):
    prepare(self)
    config = self.run_dir / "config.yaml"
    if "undisturbed" not in str(self.folder):
        config.write_text(config.read_text().replace("seed: 0", "seed: 1", 1))
Trial.prepare = prepare_with_another_seed
words = ["--only", "SIGTERM", "--trials", "1", "--worlds", "1", "--seed", "7"]
chaos.main([*words, "--folder", {str(tmp_path / "chaos")!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr[-3000:]
    broken, kept, repeat = done.stderr.splitlines()[-3:]
    assert broken == "BROKEN seed 7, trial0000, SIGTERM on 1 ranks: other samples were trained on"
    assert kept == f"  kept in {tmp_path}/chaos/trial0000"
    assert repeat.endswith("tools/dev/chaos.py --seed 7 --trials 1 --only SIGTERM --worlds 1")
    assert (tmp_path / "chaos/trial0000/run/config.yaml").exists()


def test_ranks_of_a_patient_campaign_are_patient_too(tmp_path):
    """On a busy machine a peer that is silent for a minute looked like a broken promise."""
    found = [Trial("SIGTERM", 2, 0, tmp_path, tmp_path, limit_s).config.train for limit_s in (120, 1200)]
    assert [(train.timeout_s, train.stall_s) for train in found] == [(60, 30), (600, 300)]
    frozen = Trial("rank frozen", 2, 0, tmp_path, tmp_path, 1200).config.train
    assert frozen.stall_s == 4  # the fault waits for it


def test_ranks_that_hang_are_quoted_as_they_were_before_the_campaign_killed_them(tmp_path, monkeypatch):
    """A campaign on a busy machine blamed "Connection closed by peer", which its own kill had caused."""
    held, other = os.pipe()

    def rank(run_dir, number, world, port, events):
        os.close(other if number else held)
        os.write(1, f"rank {number} works\n".encode())
        if number == 0:
            signal.pause()
        os.read(held, 1)  # until rank 0 is gone
        os.write(1, b"Connection closed by peer\n")
        signal.pause()

    monkeypatch.setattr(ranks, "_rank", rank)
    group = ranks.Group(tmp_path, tmp_path / "logs", 2)
    os.close(held)
    os.close(other)
    while group.text().count("works") < 2:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="ranks .0, 1. still run, but reported nothing for 0 s") as caught:
        group.wait(0.1)
    assert "rank 1 works" in str(caught.value) and "closed by peer" not in str(caught.value)
    assert list(group.codes.values()) == [-signal.SIGKILL] * 2


def test_the_command_that_repeats_a_trial_is_quoted_for_a_shell():
    outcome = Outcome("rank frozen", 3, 12, "a rank hung\nlog", 0, False, 0, 1.0, "/tmp/x/trial0004")
    lines = chaos.failure(outcome).splitlines()
    assert lines[0] == "BROKEN seed 12, trial0004, rank frozen on 3 ranks: a rank hung"
    assert "--only 'rank frozen'" in lines[-1]


def hold(tmp_path, *lines: str) -> subprocess.CompletedProcess:
    """Run `lines` in a process of their own, with a server that only answers."""
    script = HOLDER + "\n".join(lines)
    command = [sys.executable, "-c", script, str(tmp_path), STAND_IN]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def numbers(line: str) -> list[int]:
    return [int(word) for word in line.split()]


def test_a_server_dies_with_the_process_that_holds_it(tmp_path):
    """Even with SIGKILL, and with a child of the server that has left its session."""
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    holder = hold(tmp_path, "held = Server(folder, stand_in)", "held.start()", "show()", kill)
    assert holder.returncode == -signal.SIGKILL, holder.stderr[-2000:]
    pids = numbers(holder.stdout)
    assert len(pids) == 3  # keeper, server, the server's child
    assert wait_for_end(pids) == []


def test_a_server_stops_starts_again_and_is_closed(tmp_path):
    holder = hold(
        tmp_path,
        "with Server(folder, stand_in) as server:",
        "    for ask in (server.start, server.stop, server.start):",
        "        ask()",
        "        show()",
        "show()",
    )
    assert holder.returncode == 0, holder.stderr[-2000:]
    started, stopped, again, closed = [numbers(line) for line in holder.stdout.splitlines()]
    assert [len(pids) for pids in (started, stopped, again, closed)] == [3, 1, 3, 0]
    assert wait_for_end(started + again) == []


def test_a_server_that_does_not_start_says_why(tmp_path):
    holder = hold(
        tmp_path,
        "def broken(folder, port): return [sys.executable, '-c', 'raise SystemExit(\"no such store\")']",
        "with Server(folder, broken) as server:",
        "    server.start()",
    )
    assert holder.returncode == 1
    assert "RuntimeError: mlflow server did not start: no such store" in holder.stderr


def test_a_process_that_outlives_its_parent_is_ended_and_named(tmp_path):
    holder = hold(
        tmp_path,
        "import subprocess",
        "from tools.dev.chaos_parts.processes import adopt_orphans",
        "adopt_orphans()",
        'leave = \'import subprocess; subprocess.Popen(["sleep", "600"], start_new_session=True)\'',
        "subprocess.run([sys.executable, '-c', leave])",
        "show()",
        "print(end_descendants())",
        "show()",
    )
    before, named, after = holder.stdout.splitlines()
    (orphan,) = numbers(before)
    assert re.fullmatch(rf"\['{orphan} \((sleep|python).*\)'\]", named) and not after
    assert not is_running(orphan)


def test_the_fixture_of_the_test_run_finds_a_daemon(tmp_path):
    """A test that leaves a daemon behind fails its run, with the daemon's command line."""
    leave = "import subprocess; subprocess.Popen(['sleep', '601'], start_new_session=True)"
    test = f"""
import importlib.util, subprocess, sys
spec = importlib.util.spec_from_file_location("survivors", {str(ROOT / "tests/survivors.py")!r})
survivors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(survivors)
survivors.GRACE_S = 0.2
_nothing_survives = survivors._nothing_survives
def test_that_leaves_a_daemon():
    subprocess.run([sys.executable, "-c", {leave!r}])
"""
    file = tmp_path / "test_it.py"
    file.write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "setup.cfg"), "--rootdir", str(ROOT)]
    done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout
    assert "outlived the tests" in done.stdout and "(sleep 601)" in done.stdout
    assert "1 passed, 1 error" in done.stdout
