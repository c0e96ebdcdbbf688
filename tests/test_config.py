"""Configuration: defaults < YAML < overrides; every mistake names the key and what to do."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from pipeline.config import limits, renamed, schema
from pipeline.config import load as configuration
from pipeline.config.load import flatten, load, with_values
from pipeline.config.paths import absolute_paths
from pipeline.config.renamed import OLD_STAGE_KEYS
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.training.checkpoints.weights import require_same

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
        ("tune.losses.perceptual.style=-1", "'tune.losses.perceptual.style': got -1.0, expected at least 0"),
        ("tune.batch_size=0", "'tune.batch_size': got 0, expected at least 1"),
        ("refine.images=-5", "'refine.images': got -5, expected at least 0"),
        ("refine.attribute_dropout=10", "'refine.attribute_dropout': got 10.0, expected 0 to 1"),
        ("train.ema_decay=1", "'train.ema_decay': got 1.0, expected 0 to less than 1"),
        ("steer.optim.beta1=1.5", "'steer.optim.beta1': got 1.5, expected 0 to less than 1"),
        ("optim.lr=.nan", "'optim.lr': got nan, expected more than 0"),
        ("model.prior.flow.layers=0", "'model.prior.flow.layers': got 0, expected at least 1"),
        ("refine.prior.flow_matching.side=0", "side': got 0, expected at least 1"),
        ("data.attributes=[Male,Young,Male]", "'data.attributes': names Male twice"),
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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.stages.eval.node=2", "cluster.stages.eval.*'node'; did you mean 'nodes'"),
        ("cluster.stages.eval.nodes=two", "cluster.stages.eval.*nodes"),
        ("cluster.stages.eval.executor=local", "cluster.stages.eval.*'executor'"),
    ],
)
def test_a_wrong_setting_of_a_stage_is_named(override, said):
    with pytest.raises(ConfigError, match=said):
        load([], [override])


def test_null_resets_a_stages_setting_but_not_in_an_earlier_runs_record(tmp_path):
    cluster = load([], ["cluster.partition=gpu", "cluster.stages.eval.partition=null"]).cluster
    assert configuration.resources(cluster, "eval").partition is None
    keys = ", ".join(f"{key}: null" for key in OLD_STAGE_KEYS)
    (tmp_path / "old.yaml").write_text(f"cluster: {{partition: gpu, stages: {{eval: {{{keys}}}}}}}\n")
    recorded = load([tmp_path / "old.yaml"]).cluster
    assert configuration.resources(recorded, "eval").partition == "gpu"


def test_nothing_changes_a_configuration_after_loading():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 3


def test_every_choice_bound_and_path_names_a_real_key():
    keys = flatten(RunConfig()).keys()
    ranges = {*limits.AT_LEAST_ONE, *limits.AT_LEAST_ZERO, *limits.ABOVE_ZERO, *limits.SHARES, *limits.DECAYS}
    assert {*limits.CHOICES, *ranges, *schema.PATH_KEYS, *renamed.RENAMED.values()} <= keys
    assert not renamed.RENAMED.keys() & keys


def section_classes():
    found = inspect.getmembers(schema, dataclasses.is_dataclass)
    return [kind for name, kind in found if kind.__module__ == schema.__name__]


@pytest.mark.parametrize("section", section_classes(), ids=lambda kind: kind.__name__)
def test_every_key_has_one_comment_that_gives_its_choices(section):
    lines = inspect.getsource(section).splitlines()
    names = {kind: name for name, kind in section_names().items()}
    for field in dataclasses.fields(section):
        (line,) = [line for line in lines if line.startswith(f"    {field.name}: ")]
        comment = line.partition("  # ")[2]
        assert comment, f"{section.__name__}.{field.name} has no comment"
        choices = limits.CHOICES.get(f"{names.get(section, '')}.{field.name}", ())
        assert all(choice in comment for choice in choices), field.name


def section_names():
    """{'train': TrainConfig, ...}"""
    config = RunConfig()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: type(value) for name, value in values.items() if dataclasses.is_dataclass(value)}


# ---- old names of keys


@pytest.fixture
def nothing_told(monkeypatch):
    monkeypatch.setattr(renamed, "_told", set())


def test_old_names_load_with_one_message(tmp_path, caplog, nothing_told):
    (tmp_path / "old.yaml").write_text("train: {checkpoint_interval: 7, images: 50}\n")
    assert load([tmp_path / "old.yaml"]).train.max_lost_steps == 7
    config = load([tmp_path / "old.yaml"], ["train.checkpoint_interval=9"])
    assert (config.train.max_lost_steps, config.train.images) == (9, 50)
    (record,) = caplog.records
    assert "'train.checkpoint_interval' is now called 'train.max_lost_steps'" in record.message
    assert "old.yaml" in record.message


def test_both_names_of_a_key_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("train: {checkpoint_interval: 7, max_lost_steps: 8}\n")
    with pytest.raises(ConfigError, match="'train.checkpoint_interval' is the old name.*remove one"):
        load([tmp_path / "x.yaml"])


def test_sections_of_old_checkpoints_compare_under_the_new_names(monkeypatch, tmp_path):
    monkeypatch.setitem(renamed.RENAMED, "optim.rate", "optim.lr")
    require_same({"optim": {"rate": 0.1}}, {"optim": {"lr": 0.1}}, tmp_path)


# ---- paths


def test_paths_are_expanded_and_absolute(monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for written, meant in (
        ("$SCRATCH/a", "scratch/a"),
        ("${SCRATCH}_2/a", "scratch_2/a"),
        ("~/a", "home/a"),
        ("a", "a"),
    ):
        config = absolute_paths(load([], [f"{key}={written}" for key in schema.PATH_KEYS]))
        for key in schema.PATH_KEYS:
            assert flatten(config)[key] == str(tmp_path / meant), (key, written)
        (tmp_path / "x.yaml").write_text(configuration.dump(config))
        assert absolute_paths(load([tmp_path / "x.yaml"])) == config


def test_every_tar_of_a_list_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = absolute_paths(load([], ["shard.source='a/x-{0..1}.tar::b/y.tar'"]))
    assert config.shard.source == f"{tmp_path}/a/x-{{0..1}}.tar::{tmp_path}/b/y.tar"
    for place in ("a::b/c", "s3://a/x.tar::s3://a/y.tar"):  # a folder, and URLs
        config = absolute_paths(load([], [f"shard.source='{place}'"]))
        assert config.shard.source == (str(tmp_path / place) if place.startswith("a") else place)


@pytest.mark.parametrize("key", schema.PATH_KEYS)
@pytest.mark.parametrize(
    "written,said",
    [
        ("$NOWHERE/a", r"\$NOWHERE is not set"),
        ("/a/${NOWHERE}", r"\$NOWHERE is not set"),
        ("~nobody-is-called-so/a", "unknown user"),
        ("/a/$API_TOKEN", "looks like a secret"),
        ("${NOWHERE:-/a}/b", "only ~, .NAME and"),
        ("/a/$(whoami)", "only ~, .NAME and"),
        ("/a/$$", "only ~, .NAME and"),
    ],
)
def test_unknown_variables_are_refused_with_the_key(key, written, said, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "hush")
    with pytest.raises(ConfigError, match=f"key '{key}'.*{said}"):
        absolute_paths(load([], [f"{key}={written}"]))


def test_a_folder_with_a_dollar_in_its_name_is_taken_as_it_is(tmp_path):
    folder = tmp_path / "a$b"
    folder.mkdir()
    assert absolute_paths(load([], [f"runs_dir={folder}"])).runs_dir == str(folder)
    braces = tmp_path / "a${b:-c}"
    braces.mkdir()
    assert absolute_paths(load([], [f"runs_dir={braces}"])).runs_dir == str(braces)


def test_variables_of_the_node_and_of_the_shell_stay_for_the_job(tmp_path):
    config = load([], ["data.stage_to=${SLURM_TMPDIR}/x", "cluster.setup=['export A=${B}']"])
    assert config.data.stage_to == "${SLURM_TMPDIR}/x" and config.cluster.setup == ["export A=${B}"]
    (tmp_path / "x.yaml").write_text(configuration.dump(absolute_paths(config)))
    assert load([tmp_path / "x.yaml"]).data == config.data
    assert with_values(config, {"train.images": 9}).cluster == config.cluster
