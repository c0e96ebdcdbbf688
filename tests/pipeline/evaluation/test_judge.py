"""The independent judge loads only the published weights, and an image's features stand alone."""

import pytest
import torch

from pipeline.config.extras import JUDGE_CODE, JUDGE_WEIGHTS, installed
from pipeline.errors import DataError
from pipeline.evaluation import judge

needs_judge = pytest.mark.skipif(not installed(JUDGE_CODE, JUDGE_WEIGHTS), reason="needs the extra `judge`")


@needs_judge
def test_features_do_not_depend_on_the_neighbours():
    net = judge.load_judge()
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        together, alone = judge.judge_features(net, images), judge.judge_features(net, images[:1])
    assert together.shape == (3, 1280) and together.dtype == torch.float32
    assert torch.allclose(together[:1], alone, atol=1e-4)


@needs_judge
def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(judge, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(DataError, match="not the published weights"):
        judge.load_judge()
