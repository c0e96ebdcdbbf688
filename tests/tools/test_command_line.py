"""The command lines of launch.py and all tools: the same words, help that helps, completion in bash."""

import errno
import json
import re
import subprocess
import sys

import pytest

from pipeline.command_line import versions
from pipeline.errors import UserError
from tests.conftest import ROOT
from tests.fake_run import make_run
from tools import cancel, logs
from tools.dev import completion

PROGRAMS = completion.programs()
SHARED = {  # one word means one thing everywhere
    "run_dir": "run directory",
    "out": "",
    "seed": "",
    "device": "where to compute",
    "follow": "Ctrl-C ends this, not the jobs",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_examples_units_and_defaults(program):
    parser = completion.parser_of(PROGRAMS[program])
    text = parser.format_help()
    assert f"examples:\n  python {program}" in text and parser.description
    assert max(map(len, text.splitlines())) <= 116
    for action in parser._actions:
        assert action.help, f"{program} {action.dest}: no help"
        assert SHARED.get(action.dest, "") in action.help
        shown = f"(default: {action.default})"
        if isinstance(action.default, int | float) and action.nargs != 0:
            assert shown in " ".join(text.split()), f"{program} {action.dest}: default is not shown"


def test_version_names_what_a_report_of_a_bug_needs():
    done = subprocess.run(
        [sys.executable, "tools/cancel.py", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == versions()
    assert "torch 2" in versions() and "Python 3" in versions()


def test_the_script_of_completion_is_current():
    assert completion.FILE.read_text() == completion.script(), (
        "tools/completion.bash is old; run: python tools/dev/completion.py"
    )


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("python launch.py --conf", "--config"),
        ("python launch.py --cluster ''", "debug local slurm"),
        ("python launch.py train.batch_s", "train.batch_size="),
        ("python launch.py --stages cl", "classifier"),
        ("python launch.py --run-dir runs/", "runs/one runs/deep/two"),
        (".venv/bin/python tools/status.py runs/o", "runs/one"),
        ("python tools/export.py --weights ''", "ema raw"),
        ("python elsewhere.py --conf", ""),
    ],
)
def test_bash_completes(words, offered, tmp_path):
    for run in ("one", "deep/two"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "config.yaml").touch()
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shell = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _cvae; echo "${COMPREPLY[*]}"'
    code = f'source "$0"; COMP_WORDS=({words}); {shell}'
    done = subprocess.run(
        ["bash", "-c", code, str(completion.FILE)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == offered, done.stderr


def test_a_running_stage_says_how_far_it_is(tmp_path):
    from slurm.status import survey

    run = make_run(tmp_path, "flow")
    (run / "jobs.json").write_text('[{"stage": "eval", "id": "7", "state": "RUNNING", "attempts": []}]')
    (run / "logs/eval").mkdir(parents=True)
    log = "10:00:00 eval[0] I metrics 3/12, rare took 1.0 s\n10:00:01 eval[0] W a network is missing\n"
    (run / "logs/eval/rank0.log").write_text(log)
    assert survey([run])[0].progress == "metrics 3/12, rare took 1.0 s"


def test_a_training_that_is_complete_has_no_time_left(tmp_path):
    from slurm.status import survey

    run = make_run(tmp_path, "flow", steps=3)
    job = {"stage": "train", "id": "7", "state": "COMPLETED", "attempts": []}
    (run / "jobs.json").write_text(json.dumps([job]))
    done, _, last = survey([run])[0].progress.partition("/")
    assert done == last != "3"


def test_a_launch_shows_progress_warnings_and_nothing_else(tmp_path, capsys):
    from slurm.executors.view import StageView

    log = tmp_path / "rank0.log"
    view = StageView(log, "[1/2] flow train")
    log.write_text(
        "10:00:00 train[0] I starting from the weights of x\n10:00:01 train[0] I step 4/16, loss 2.5,"
    )
    view.show()
    with open(log, "a") as more:
        more.write(" 70 images/s, 200 s left\n10:00:02 train[0] W the disk is slow\nTraceback\n")
    view.show()
    view.end()
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "[1/2] flow train: starting",
        "[1/2] flow train: step 4/16, loss 2.5, 70 images/s, 3 min 20 s left",
        "[1/2] flow train: warning: the disk is slow",
    ]
    assert said[3].startswith("[1/2] flow train: done in ") and len(said) == 4


@pytest.mark.parametrize(
    ("tool", "words", "said"),
    [
        (cancel, ["typo"], "typo: no config.yaml in it, so it is not a run directory"),
        (logs, ["typo", "train"], "typo: no config.yaml in it, so it is not a run directory"),
        (logs, ["flow", "evall"], "argument STAGE: invalid choice: 'evall'"),
        (logs, ["flow", "train", "--rank", "99"], "--rank 99: .*rank99.log is not there"),
    ],
)
def test_a_run_stage_or_rank_that_is_not_there_is_refused(tool, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "flow", steps=4)
    with pytest.raises((UserError, SystemExit)) as caught:
        tool.main(words)
    assert re.search(said, f"{caught.value}{capsys.readouterr().err}")


def test_status_without_words_lists_all_runs(tmp_path, monkeypatch, capsys):
    from tools import status

    monkeypatch.chdir(tmp_path)
    status.main([])
    assert "no runs in runs" in capsys.readouterr().out
    make_run(tmp_path / "runs", "flow", steps=4, evals=2)
    make_run(tmp_path / "runs/demo", "plain")
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/config.yaml").write_text("no: such")
    status.main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == "demo/plain" and "not started" in lines[2]
    assert lines[3].split()[0] == "flow" and " 1, 2 " in lines[3]
    assert lines[4].startswith("runs/broken: ") and "unknown key" in lines[4]


def test_a_run_that_others_may_not_read_hides_no_other_run(tmp_path, monkeypatch):
    from pipeline.rundir import record
    from slurm import overview

    def run_config(run_dir):
        if run_dir.name == "closed":  # as under umask 077; root may read all
            raise PermissionError(errno.EACCES, "Permission denied", str(run_dir / "config.yaml"))
        return record.run_config(run_dir)

    make_run(tmp_path, "closed")
    make_run(tmp_path, "open")
    monkeypatch.setattr(overview, "run_config", run_config)
    lines = overview.overview(overview.all_runs(tmp_path), tmp_path).splitlines()
    assert lines[2].split()[0] == "open"
    assert lines[3].startswith(f"{tmp_path}/closed: ") and "config.yaml could not be read" in lines[3]
