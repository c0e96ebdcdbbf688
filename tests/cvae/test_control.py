"""Attribute control: scores read the attributes from codes, moves change one score and spare the rest."""

from __future__ import annotations

import pytest
import torch

from cvae.control import AttributeControl, CodeMoments, turned

N, D, A = 4000, 12, 4


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, D] that depend on correlated attributes [N, A]; no image has the last attribute."""
    generator = torch.Generator().manual_seed(0)
    cause = torch.randn(N, A, generator=generator, dtype=torch.float64)
    cause[:, 1] += cause[:, 0]  # attributes 0 and 1 often come together
    y = (cause > 0.5).double()
    y[:, 3] = 0
    effect = torch.randn(A, D, generator=generator, dtype=torch.float64)
    z = y @ effect + 0.7 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return z, y


@pytest.fixture(scope="module")
def control(data) -> AttributeControl:
    z, y = data
    control = AttributeControl(D, A).double()
    control.fit(CodeMoments(z.mean(0), y.mean(0), z.T @ z / N, z.T @ y / N))
    return control


def test_an_average_image_scores_one_or_minus_one(data, control):
    z, y = data
    scores = control.scores(z)
    for k in range(3):
        torch.testing.assert_close(scores[y[:, k] == 1, k].mean(), scores.new_tensor(1.0))
        torch.testing.assert_close(scores[y[:, k] == 0, k].mean(), scores.new_tensor(-1.0))


def test_an_edit_raises_its_score_and_spares_the_others(data, control):
    z, y = data
    after = y.clone()
    after[:, 0] = 1 - after[:, 0]
    moved = control.edit(z, y, after, strength=2.0)
    change = (control.scores(moved) - control.scores(z)).abs().mean(0)
    assert change[0] > 1 and change[1] < 0.5 * change[0] and change[2] < 0.5 * change[0]
    # Adding the difference of the class means would drag the correlated attribute along.
    naive = z[y[:, 0] == 1].mean(0) - z[y[:, 0] == 0].mean(0)
    dragged = control.weight @ naive
    assert change[1] / change[0] < 0.8 * abs(dragged[1] / dragged[0])


def test_equal_requests_and_scores_beyond_the_goal_leave_codes_alone(data, control):
    z, y = data
    assert torch.equal(control.edit(z, y, y, strength=3.0), z)
    far = z.new_zeros(1, D) + 10 * control.gain[0]
    assert control.scores(far)[0, 0] > 1
    nothing, asked = torch.zeros(1, A).double(), torch.tensor([[1.0, 0, 0, 0]]).double()
    assert torch.equal(control.edit(far, nothing, asked, strength=1.0), far)


def test_codes_obey_what_is_known_of_the_request(data, control):
    z, y = data
    wrong = 1 - y
    wrong[:, 3] = 0
    before = ((control.scores(z) > 0) == wrong.bool())[:, :3].double().mean()
    after = ((control.scores(control.obey(z, wrong, 1.0)) > 0) == wrong.bool())[:, :3].double().mean()
    assert before < 0.2 and after > 0.7
    unknown = torch.full_like(y, 0.5)
    assert torch.equal(control.obey(z, unknown, 1.0), z)


def test_an_attribute_that_no_image_has_moves_nothing(data, control):
    z, y = data
    after = y.clone()
    after[:, 3] = 1
    assert torch.equal(control.edit(z, y, after), z)
    assert all(buffer.isfinite().all() for buffer in control.buffers())


@pytest.fixture(scope="module")
def steered(data) -> AttributeControl:
    """A control whose reader has learned a score that no linear map gives: |z_0| > 1 is attribute 2."""
    z, y = data
    torch.manual_seed(0)
    control = AttributeControl(D, A, reader=32).double()
    control.fit(CodeMoments(z.mean(0), y.mean(0), z.T @ z / N, z.T @ y / N))
    optimizer = torch.optim.Adam(control.parameters(), 1e-2)
    for _ in range(300):
        codes = z + torch.randn_like(z)
        target = control.scores(codes)
        target[:, 2] = codes[:, 0].abs() - 1
        optimizer.zero_grad()
        (control.read(codes) - target).square().mean().backward()
        optimizer.step()
    return control.requires_grad_(False)


def test_a_reader_moves_codes_to_what_it_reads_and_keeps_the_rest(data, steered):
    z, y = (x[:200] for x in data)
    after = y.clone()
    after[:, 2] = 1 - after[:, 2]
    moved = steered.edit(z, y, after, strength=1.0)
    sign = 2 * after - 1
    before = steered.read(z)
    linear = steered.edit_linearly(z, y, after, 1.0)
    wrong = (sign * before)[:, 2] < 0
    won, won_linearly = (((sign * steered.read(x))[wrong, 2] > 0).double().mean() for x in (moved, linear))
    assert won > 0.7 and won > won_linearly + 0.2
    others = (steered.read(moved) - before)[:, [0, 1, 3]]
    assert others.square().mean() < 0.02


def test_a_score_counts_by_the_decisions_that_it_may_turn():
    before = torch.tensor([0.0, 3.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    after = torch.tensor([0.5, 3.5, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    near, far, still, across = chance = turned(before.detach(), after)
    assert 0 < still < far + 0.01 < near - 0.1 < across - 0.6 < 0.4
    torch.testing.assert_close(chance, turned(after, before.detach()))  # on or off counts alike
    (gradient,) = torch.autograd.grad(chance.sum(), after)
    assert gradient.isfinite().all() and gradient[2] == 0


def test_a_code_moves_alike_alone_and_in_a_batch(data, steered):
    z, y = (x[:8] for x in data)
    after = y.clone()
    after[::2, 1] = 1 - after[::2, 1]
    together = steered.edit(z, y, after, 1.0)
    alone = torch.cat([steered.edit(z[i : i + 1], y[i : i + 1], after[i : i + 1], 1.0) for i in range(8)])
    torch.testing.assert_close(together, alone)
    assert torch.equal(together[1::2], z[1::2])  # nobody asked for a change
    with torch.no_grad():
        torch.testing.assert_close(steered.edit(z, y, after, 1.0), together)
