"""The anomaly score of codes, and samples that are drawn again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cvae.anomaly import AnomalyScore, draw_again
from cvae.config import ModelConfig, PriorConfig, ResidualConfig
from cvae.model import CVAE
from cvae.nets.shapes import require_fit


def config(**changes: object) -> ModelConfig:
    residual = ResidualConfig(channels=[8, 16], encoder_blocks=[0, 1], decoder_blocks=[1, 1], grid=True)
    base = ModelConfig(z_dim=16, residual=residual, prior=PriorConfig(name="gaussian", anomaly=True))
    base = replace(base, encoder=replace(base.encoder, name="residual"))
    base = replace(base, decoder=replace(base.decoder, name="residual"))
    return replace(base, **changes)  # type: ignore[arg-type]


def moments(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of f and f f^T over images; cells [cells, B, C]."""
    cells = cells.double()
    return cells.mean(1), cells.transpose(1, 2) @ cells / cells.shape[1]


def test_the_score_is_the_squared_distance_in_deviations_of_each_cell() -> None:
    torch.manual_seed(0)
    score = AnomalyScore(channels=3, side=4)
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    maps = (torch.randn(4000, 4, 4, 3) @ mix + 2.0).movedim(3, 1)
    score.fit(*moments(score.cells(maps)))
    assert score.usual == pytest.approx(3.0, rel=0.03)  # C, less what the damping takes
    assert score(maps).mean() == pytest.approx(0.0, abs=1e-4)

    one = maps[:1].clone()
    far = one.clone()
    far[0, :, 1, 2] += 10 * mix[0]  # ten deviations away in one cell of sixteen
    centre = score.mean.view(4, 4, 3)[1, 2]
    gain = (far[0, :, 1, 2] - centre, one[0, :, 1, 2] - centre)
    precision = score.precision.view(4, 4, 3, 3)[1, 2]
    expected = sum(sign * (d @ precision @ d) for sign, d in zip((1, -1), gain, strict=True)) / 16
    assert score(far) - score(one) == pytest.approx(expected.item(), rel=1e-4)


def test_large_maps_are_averaged_over_cells_first() -> None:
    score = AnomalyScore(channels=2, side=32)
    assert score.mean.shape == (64, 2)
    maps = torch.zeros(1, 2, 32, 32)
    maps[0, 0, :4, :4] = 8.0
    assert score.cells(maps)[0, 0].tolist() == [8.0, 0.0] and not score.cells(maps)[1:].any()


def test_a_row_is_drawn_until_it_is_ordinary_and_else_keeps_its_best_try() -> None:
    scores = torch.tensor([[-1.0, -9.0, -9.0], [5.0, -1.0, -9.0], [5.0, 3.0, 4.0], [5.0, 6.0, 7.0]])
    noise = torch.stack((scores, torch.arange(12.0).view(4, 3)), -1)  # [row, try, (score, number)]
    drawn = []

    def code(some: Tensor, rows: Tensor) -> Tensor:
        drawn.append(rows.tolist())
        return some * 10

    kept, codes = draw_again(noise, code, lambda z, rows: z[:, 0] / 10)
    assert kept[:, 1].tolist() == [0, 4, 7, 9] and torch.equal(codes, kept * 10)
    assert drawn == [[0, 1, 2, 3], [1, 2, 3], [2, 3]]
    assert noise[1, 0, 0] == 5.0  # what was given is left as it is


def test_a_single_try_needs_no_score() -> None:
    noise = torch.randn(2, 1, 16)
    kept, codes = draw_again(noise, lambda some, rows: some + 1, lambda z, rows: 1 / 0)
    assert torch.equal(kept, noise[:, 0]) and torch.equal(codes, noise[:, 0] + 1)


def test_a_model_rates_codes_by_the_maps_in_the_middle_of_its_decoder() -> None:
    torch.manual_seed(1)
    model = CVAE(config(), image_size=16, n_attributes=5).eval()
    assert model.anomaly is not None
    y = torch.zeros(500, 5)
    with torch.no_grad():
        usual = torch.randn(500, 16)
        model.anomaly.fit(*moments(model.anomaly.cells(model.middle(usual, y))))
        assert model.anomaly_of(usual, y).mean() == pytest.approx(0.0, abs=1e-3)
        assert (model.anomaly_of(8 * usual, y) > 0).all()
        maps = list(model.decoder.maps(usual[:3], model.condition(y[:3])))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 4, 4), (8, 8, 8)]


def test_the_score_is_refused_for_a_decoder_without_levels() -> None:
    wrong = config(decoder=ModelConfig().decoder, encoder=ModelConfig().encoder)
    with pytest.raises(ValueError, match=r"prior\.anomaly=true needs model\.decoder\.name=residual"):
        require_fit(wrong, 64)


def test_constant_maps_do_not_break_the_fit() -> None:
    score = AnomalyScore(channels=4, side=2)
    score.fit(*moments(torch.zeros(4, 10, 4)))
    assert np.isfinite(score(torch.ones(1, 4, 2, 2)).item())
