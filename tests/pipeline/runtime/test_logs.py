"""Log files: what any module says reaches the file of the stage that runs."""

import logging

import pytest

from pipeline.data import shards
from pipeline.errors import StorageError
from pipeline.rundir import lock
from pipeline.runtime import owner
from pipeline.runtime.logs import stage_log
from pipeline.stages import STAGES
from pipeline.training.checkpoints import store as checkpoint

MODULES = (shards, checkpoint, owner, lock)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_modules_warning_is_in_the_log_of_every_stage(stage, module, tmp_path, capsys):
    with stage_log(stage, tmp_path, rank=0) as log:
        module.log.warning("something is odd")
        log.info("going on")
    lines = (tmp_path / "logs" / stage / "rank0.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        f"{stage}[0] W something is odd",
        f"{stage}[0] I going on",
    ]
    assert capsys.readouterr().err.splitlines() == lines


def test_other_ranks_log_warnings_only(tmp_path):
    with stage_log("train", tmp_path, rank=1) as log:
        log.info("a step")
        shards.log.warning("something is odd")
    assert "a step" not in (tmp_path / "logs/train/rank1.log").read_text()
    assert "something is odd" in (tmp_path / "logs/train/rank1.log").read_text()


def test_a_part_of_a_stage_has_a_file_of_its_own(tmp_path):
    with stage_log("shard", tmp_path, rank=0, part=(3, 8)) as log:
        log.info("a shard")
    assert (tmp_path / "logs/shard/part3.log").read_text().endswith("a shard\n")


def test_nothing_is_logged_twice_after_a_second_stage(tmp_path):
    for stage in ("shard", "train"):
        with stage_log(stage, tmp_path, rank=0) as log:
            log.info("working")
    assert len((tmp_path / "logs/shard/rank0.log").read_text().splitlines()) == 1
    assert logging.getLogger("cvae").propagate and not logging.getLogger("cvae").handlers


def test_a_log_on_a_full_disk_hides_no_error_of_the_stage(tmp_path, capsys):
    (tmp_path / "logs" / "train").mkdir(parents=True)
    (tmp_path / "logs" / "train" / "rank0.log").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the checkpoint"), stage_log("train", tmp_path, rank=0) as log:
        log.info("step 1")
        raise StorageError("the checkpoint could not be written")
    said = capsys.readouterr().err
    assert "step 1" in said and "Traceback" not in said
