"""Evidence: computed by all ranks together, read by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.evaluation.evidence import MissingPart
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.parts import PARTS
from pipeline.runtime.distributed import Ranks
from tests.pipeline.evaluation.painter import Cells, evidence
from tests.tiny_run import make_shards, tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with shards."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(tiny_config(folder), train=400, val=80, test=80)
    return folder


def test_reading_a_part_never_starts_a_collective(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collective(*args: Any) -> Any:
        raise AssertionError("a collective was started")

    own = evidence(runs)
    for name in ("reduce_sum", "gather_rows", "text_from_main", "barrier"):
        monkeypatch.setattr(Ranks, name, collective)
    for part in PARTS:
        with pytest.raises(MissingPart, match=f"'{part}' was not computed.*`needs`"):
            own[part]
        assert part not in own
    with pytest.raises(AssertionError, match="a collective"):
        own.compute("rare")


def test_a_part_is_computed_once(runs: Path) -> None:
    own = evidence(runs)
    own.compute("samples")
    first = own["samples"]
    own.compute("samples", "reconstructions")
    assert own["samples"] is first and "reconstructions" in own


def test_needs_are_parts() -> None:
    for metric in METRICS.values():
        assert metric.needs and set(metric.needs) <= PARTS.keys(), metric


def test_the_bound_has_a_row_per_image_and_variance(runs: Path) -> None:
    own = evidence(runs, n=20, iw_images=12, iw_samples=3)
    own.compute("log_likelihood")
    shapes = {name: rows.shape for name, rows in own["log_likelihood"].items()}
    assert shapes == {"iw": (12,), "iw_fitted": (12,)}  # s2 and s2_fit differ here


def test_rare_samples_are_numbered_by_their_combination(runs: Path) -> None:
    own = evidence(runs)
    own.compute("rare")
    rows, combinations = own["rare"], own.rare_combinations()
    assert len(combinations) == len(rows["columns"]) > 1
    assert rows["combination"].tolist() == [i for i in range(len(combinations)) for _ in range(10)]
    assert len(rows["fd_classifier"]) == len(rows["combination"])
    none = evidence(runs, rare_samples=0)
    none.compute("rare")
    assert "fd_classifier" not in none["rare"] and len(none["rare"]["combination"]) == 0


def test_a_margin_acts_on_the_attributes_that_a_request_names(runs: Path) -> None:
    heard: list[torch.Tensor] = []

    def obey(z: torch.Tensor, asked: torch.Tensor, margin: float) -> torch.Tensor:
        assert margin == 2.0
        heard.append(asked)
        return z

    own = evidence(runs, margin=2.0)
    with pytest.raises(ConfigError, match=r"'eval.margin': got 2.0.*refine.prior.control=true"):
        own.compute("rare")
    own.model.control = SimpleNamespace(obey=obey)  # type: ignore[assignment]
    own.compute("samples")
    assert not heard  # a row of labels names nothing
    own.compute("rare")
    asked = torch.cat(heard)
    names = own.info.attributes
    for i, combination in enumerate(own.rare_combinations()):
        rows = asked[torch.from_numpy(own["rare"]["combination"] == i)]
        named = torch.tensor([name in combination.attributes for name in names])
        assert (rows[:, named] == 1).all() and (rows[:, ~named] == 0.5).all()


@pytest.mark.parametrize("part", ["samples", "rare", "flips"])
def test_anomalous_samples_are_drawn_again(runs: Path, part: str) -> None:
    """Ordinary ones are those of a single try. Here every second code of a block is anomalous at first."""

    def codes(tries: int, first: float) -> torch.Tensor:
        own = evidence(runs, tries=tries)
        decode, seen, rated = own.model.decode, [], set()

        def rate(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            again = rated.copy()
            rated.update(tuple(row) for row in y.tolist())
            score = torch.full((len(z),), -1.0)
            if not again:
                score[::2] = first
            return score

        own.model.anomaly_of = rate  # type: ignore[method-assign]
        own.model.decode = lambda z, y: seen.append(z) or decode(z, y)  # type: ignore
        own.compute(part)
        return torch.cat(seen)

    single, ordinary, again = codes(1, 0.0), codes(3, -1.0), codes(3, 1.0)
    assert torch.equal(single, ordinary)
    changed = (single != again).any(1)
    assert changed[0] and changed.any() and not changed.all()
    if part != "flips":  # whose first rows change one sample in several ways
        assert not changed[1]


def test_a_prior_without_a_velocity_refuses_guidance(runs: Path) -> None:
    own = evidence(runs, guidance=2.0)
    with pytest.raises(ConfigError, match="eval.guidance.*refine.prior.name=flow_matching"):
        own.compute("samples")


def test_edits_of_a_prior_without_a_velocity_name_their_own_key(runs: Path) -> None:
    own = evidence(runs, edit_strength=2.0)
    with pytest.raises(ConfigError, match="'eval.edit_strength': got 2.0.*refine.prior.name=flow_matching"):
        own.compute("flips")


def test_a_showcase_that_is_among_the_rarest_is_drawn_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evidence(runs)
    names = own.info.attributes
    rarest = own.counts.rare(2)[0]
    reverse = (names[rarest[1]], names[rarest[0]])
    monkeypatch.setattr(type(own), "showcase", property(lambda self: [reverse]))
    own.compute("rare")
    drawn = [frozenset(combination.attributes) for combination in own.rare_combinations()]
    assert len(drawn) == len(set(drawn)) and frozenset(reverse) in drawn


def test_a_showcase_may_name_many_attributes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = evidence(runs)
    case = (*own.info.attributes, own.info.attributes[0])  # the model reads three
    monkeypatch.setattr(type(own), "showcase", property(lambda self: [case]))
    own.compute("rare")
    assert len(case) == 4 and case in [combination.attributes for combination in own.rare_combinations()]


def test_copies_are_searched_with_features_that_do_not_know_the_training_images(runs: Path) -> None:
    class Strange(Cells):
        metric = "fd_strange"

    own = evidence(runs, neighbour_images=50)
    own.compute("memory")
    assert own["memory"].keys() == {"fd_classifier"}  # there is no other
    own = evidence(runs, neighbour_images=50)
    own.extractors.append(Strange())
    own.compute("memory")
    assert own["memory"].keys() == {"fd_strange"}
