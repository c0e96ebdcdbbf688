"""Configuration: defaults < YAML < overrides; every mistake names the key and what to do."""

import dataclasses
from pathlib import Path

import pytest

from pipeline.config import load as configuration
from pipeline.config import schema
from pipeline.config.load import flatten, load
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError

CONFIGS = Path("configs")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_variant_loads_under_its_own_name(file):
    assert load([file]).name == file.stem


def test_later_sources_win(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {batch_size: 7, images: 8}\n")
    config = load(
        [tmp_path / "a.yaml"], ["train.images=9", "data.attributes=[Male,Young]", "model.prior.flow.layers=3"]
    )
    assert (config.train.batch_size, config.train.images, config.model.prior.flow.layers) == (7, 9, 3)
    assert config.data.attributes == ["Male", "Young"]


def test_base_comes_first(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nname: a\n")
    (tmp_path / "b.yaml").write_text("base: a\nname: b\n")
    config = load([tmp_path / "b.yaml"])
    assert (config.seed, config.name) == (1, "b")
    (tmp_path / "a.yaml").write_text("base: b\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load([tmp_path / "b.yaml"])


@pytest.mark.parametrize(
    "override,said",
    [
        ("model.net.channels=base: x", "merge"),
        ("train.bach_size=3", "unknown key 'train.bach_size'; did you mean 'train.batch_size'"),
        ("train.batch_size=abc", "'train.batch_size'.*'abc'.*Integer"),
        (
            "model.prior.name=flwo",
            "'model.prior.name': got 'flwo', expected one of standard, gaussian, flow; did you mean 'flow'",
        ),
        ("train.batch_size=0", "'train.batch_size': got 0, expected at least 1"),
        ("nonsense", "expected key=value"),
        ("name=../x", "expected letters, digits"),
        ("train.batch_size=[1", "override"),
        ("train=3", "override 'train=3'"),
    ],
)
def test_mistakes_name_key_and_remedy(override, said):
    with pytest.raises(ConfigError, match=said):
        load([], [override])


@pytest.mark.parametrize(
    "text,said",
    [("- 1\n", "found a list"), ("a: [1\n", "not a valid YAML"), ("trian: {}\n", "did you mean 'train'")],
)
def test_broken_files_are_named(tmp_path, text, said):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        load([file])
    assert "x.yaml" in str(error.value)


def test_a_missing_file_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'sigma_cvae'"):
        load([CONFIGS / "sigma_cvea.yaml"])


def test_yaml_cannot_construct_objects(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("name: !!python/object/apply:os.system ['touch /tmp/owned']\n")
    with pytest.raises(ConfigError, match="not a valid YAML"):
        load([file])


def test_dump_and_load_are_inverse(tmp_path):
    config = load([CONFIGS / "paper.yaml"], ["cluster.stages.eval.nodes=2", "shard.source=/some where/o'dd"])
    (tmp_path / "x.yaml").write_text(configuration.dump(config))
    assert load([tmp_path / "x.yaml"]) == config


def test_resources_of_a_stage_override_the_cluster():
    cluster = load([], ["cluster.nodes=4", "cluster.stages.eval.nodes=1"]).cluster
    assert (
        configuration.resources(cluster, "eval").nodes == 1
        and configuration.resources(cluster, "train").nodes == 4
    )


def test_nothing_changes_a_configuration_after_loading():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 3


def test_every_choice_and_bound_names_a_real_key():
    keys = flatten(RunConfig())
    assert set(schema.CHOICES) <= keys.keys() and set(schema.AT_LEAST_ONE) <= keys.keys()
