"""One trial of each fault kind, as `tools/dev/chaos.py` does by default; and the harness itself notices a broken promise."""

import json
import subprocess
import sys

from tests.conftest import ROOT
from tools.dev.chaos_parts.faults import FAULTS


def chaos(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/dev/chaos.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=570,
    )


def test_one_trial_of_each_fault(tmp_path):
    done = chaos(
        "--worlds", "2,3", "--folder", str(tmp_path / "chaos"), "--json", str(tmp_path / "outcomes.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert {o["kind"] for o in outcomes} == set(FAULTS) and not any(o["error"] for o in outcomes)
    assert {o["kind"] for o in outcomes if o["refusals"]} == {"shard removed", "shard, one bit"}
    assert not list((tmp_path / "chaos").glob("trial*"))


def test_a_harness_that_could_not_fail_would_prove_nothing(tmp_path):
    """A run whose seed differs from the undisturbed one's: other samples, metrics and weights."""
    script = (
        "import sys; sys.path.insert(0, '.'); import tools.dev.chaos as c; from tools.dev.chaos_parts import trial as t;"
        "prepare = t.Trial.prepare;"
        "t.Trial.prepare = lambda self: (prepare(self), 'undisturbed' in str(self.folder) or"
        " (self.run_dir / 'config.yaml').write_text((self.run_dir / 'config.yaml').read_text().replace('seed: 0', 'seed: 1', 1)));"
        f"c.main(['--only', 'SIGTERM', '--trials', '1', '--worlds', '1', '--folder', {str(tmp_path / 'chaos')!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "other samples were trained on" in done.stderr, done.stderr[-3000:]
