"""The signature property: 1, 2, 3 and 4 ranks follow one trajectory. Real processes, gloo."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import load as configuration
from tests.conftest import ROOT
from tests.tiny_run import ATTENTION
from tests.workers.ranks import run_ranks

WORKER = ROOT / "tests" / "workers" / "trajectory.py"
WORLDS = (1, 2, 3, 4)
FP64 = ["train.precision=fp64", "data.rotation_degrees=10"]
CASES = {
    "plain": FP64,  # equal shares on 1, 2 and 4 ranks, unequal ones on 3
    "empty_shares": [*FP64, "train.batch_size=3"],
    "accumulation": [*FP64, "train.micro_batch=1", "train.batch_size=7"],
    "learned_variance": [*FP64, "model.variance.name=learned", "model.prior.name=gaussian"],
    "unit_variance": [*FP64, "model.variance.name=unit", "model.prior.name=standard", "optim.clip_norm=0"],
    "paper_nets": [
        *FP64,
        "model.net.norm=none",
        "model.conditioner.name=embedding",
        "model.prior.net=conv1d",
    ],
    "attention": [*FP64, *ATTENTION],
    "encoded": [*FP64, "data.random_crop=0.3"],  # of the image files
    "fp32": ["train.precision=fp32"],
}
# Four ranks take most of the time, so they run what differs with their number: equal shares and empty ones.
RUNS = [(case, world) for world in WORLDS for case in CASES if world < 4 or case in ("plain", "empty_shares")]
TOGETHER = [(case, world) for case, world in RUNS if world > 1]


@pytest.fixture(scope="module")
def trajectories(
    tiny_overrides, encoded_overrides, tmp_path_factory
) -> dict[tuple[str, int], list[dict[str, torch.Tensor]]]:
    """Notes of every rank of RUNS; one group of processes runs all cases of a world size."""
    base, notes = tmp_path_factory.mktemp("trajectories"), {}
    for world in WORLDS:
        folders = []
        cases = [case for case, size in RUNS if size == world]
        for case in cases:
            folder = base / f"{case}-{world}"
            folder.mkdir()
            overrides = encoded_overrides if case == "encoded" else tiny_overrides
            (folder / "config.yaml").write_text(
                configuration.dump(configuration.load([], [*overrides, *CASES[case]]))
            )
            folders.append(folder)
        run_ranks(WORKER, [str(f) for f in folders], world)
        for case, folder in zip(cases, folders, strict=True):
            notes[case, world] = [load_file(folder / f"rank{r}.safetensors") for r in range(world)]
    return notes


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("case,world", TOGETHER)
def test_gradients_norms_losses_and_weights_do_not_depend_on_the_ranks(trajectories, case, world):
    alone, together = trajectories[case, 1][0], trajectories[case, world][0]
    # Adam and clipping would hide a wrong scale, so raw gradients and norms are compared. In single
    # precision rounding slowly separates the trajectories: only the first gradients are compared.
    bound = 1e-4 if case == "fp32" else 1e-10
    names = [
        n
        for n in alone
        if n.partition(".")[0] in ("model", "ema", "grad0", "grad1", *([] if case == "fp32" else ["grad14"]))
    ]
    assert len(names) > 40
    parts = {n.partition(".")[0] for n in names}
    scale = {
        part: torch.cat([alone[n].flatten() for n in names if n.startswith(part)]).norm() for part in parts
    }
    for name in names:
        part = name.partition(".")[0]
        error = (together[name].double() - alone[name].double()).norm() / scale[part]
        assert error < bound, name
    assert relative(together["records"][:, :-2], alone["records"][:, :-2]) < bound
    assert ((together["records"] - alone["records"]).abs() <= bound * alone["records"].abs() + bound).all()
    assert relative(together["validation"], alone["validation"]) < bound


@pytest.mark.parametrize("case,world", RUNS)
def test_all_ranks_hold_the_same_weights(trajectories, case, world):
    first, *others = trajectories[case, world]
    for other in others:
        for name in first:
            if name.startswith(("model.", "ema.")):
                assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize("case,world", TOGETHER)
def test_sample_order_does_not_depend_on_the_ranks(trajectories, case, world):
    alone = trajectories[case, 1][0]["indices"]
    together = torch.cat([notes["indices"] for notes in trajectories[case, world]], dim=1)
    assert torch.equal(together, alone)


def test_some_shares_were_empty_and_some_unequal(trajectories):
    shapes = (
        {len(n["indices"][0]) for n in trajectories["empty_shares", 4]},
        {len(n["indices"][0]) for n in trajectories["plain", 3]},
    )
    assert 0 in shapes[0] and len(shapes[1]) == 2
