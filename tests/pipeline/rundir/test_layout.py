"""Where outputs lie: a shared folder that can only be read, and shards that are given."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.prepare import require_continuable
from pipeline.rundir import layout
from pipeline.stages import STAGES
from tests.tiny_run import make_checkpoint, make_classifier, make_shards, tiny_config


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let `folder` look as it does to a user who may only read it; root may write everywhere."""

    def access(path: Path, mode: int) -> bool:
        return mode != os.W_OK or folder not in (path, *Path(path).parents)

    monkeypatch.setattr(os, "access", access)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """The configuration of a folder of runs with shards and a classifier."""
    config = tiny_config(tmp_path / "runs")
    make_shards(config)
    make_classifier(config)
    return config


OUTPUTS = {
    "toy": layout.toy_dir,
    "shards": layout.shards_dir,
    "classifier": layout.classifier_dir,
    "reference": lambda config: layout.reference_dir(config, "abc"),
    "code": lambda config: layout.code_dir(config, "abc"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_everything_lies_in_the_shared_folder_that_can_be_written(kind: str, tmp_path: Path) -> None:
    folder = OUTPUTS[kind](tiny_config(tmp_path / "runs"))
    assert folder.parent == tmp_path / "runs" / "_shared" / kind


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_a_read_only_folder_lacks_lies_beside_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/_shared").mkdir(parents=True)
    read_only(monkeypatch, tmp_path / "runs/_shared")
    folder = OUTPUTS[kind](tiny_config(tmp_path / "runs"))
    assert folder.parent == tmp_path / "runs" / "_own" / kind


def test_what_is_complete_in_a_read_only_folder_is_used(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = layout.shards_dir(config), layout.classifier_dir(config)
    read_only(monkeypatch, layout.shared_dir(config))
    assert (layout.shards_dir(config), layout.classifier_dir(config)) == there
    (there[1] / "metrics.json").unlink()  # half made by somebody else
    assert layout.classifier_dir(config) == layout.own_dir(config) / "classifier" / there[1].name


def test_what_was_made_beside_it_stays_in_use(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    own = layout.own_dir(config) / "classifier" / layout.classifier_digest(config)
    shutil.copytree(layout.classifier_dir(config), own)
    assert layout.classifier_dir(config) == own


# ---- data.shards


def test_given_shards_are_read_where_they_lie(config: RunConfig, tmp_path: Path) -> None:
    given = shutil.copytree(layout.shards_dir(config), tmp_path / "given")
    mine = tiny_config(tmp_path / "mine", f"data.shards={given}", "shard.source=/nowhere")
    assert layout.shards_dir(mine) == given
    assert STAGES["shard"].complete(mine, tmp_path)
    assert layout.classifier_dir(mine).is_relative_to(tmp_path / "mine/_shared")


def test_the_content_of_given_shards_names_their_classifier_not_their_place(
    config: RunConfig, tmp_path: Path
) -> None:
    given = shutil.copytree(layout.shards_dir(config), tmp_path / "given")
    moved = shutil.copytree(given, tmp_path / "moved")
    digests = [layout.classifier_digest(tiny_config(tmp_path, f"data.shards={f}")) for f in (given, moved)]
    assert digests[0] == digests[1]
    other = json.loads((moved / "manifest.json").read_text()) | {"content_digest": "0" * 64}
    (moved / "manifest.json").write_text(json.dumps(other))
    assert layout.classifier_digest(tiny_config(tmp_path, f"data.shards={moved}")) != digests[0]


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"splits": '])
def test_a_folder_without_sound_shards_is_refused_by_key_and_name(
    content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    config = tiny_config(tmp_path / "runs", f"data.shards={tmp_path}")
    with pytest.raises(ConfigError, match=f"key 'data.shards': {tmp_path}: its manifest.json"):
        layout.shards_dir(config)


def test_a_run_may_go_on_with_its_shards_in_another_place(config: RunConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs/run"
    make_checkpoint(run_dir, config, ["Male"])
    given = shutil.copytree(layout.shards_dir(config), tmp_path / "given")
    require_continuable(run_dir, tiny_config(tmp_path / "runs", f"data.shards={given}"))
