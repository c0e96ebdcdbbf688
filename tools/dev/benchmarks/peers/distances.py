"""The Fréchet term and the Inception features against scipy and torch-fidelity."""

from __future__ import annotations

import io
import time
from functools import partial
from unittest.mock import patch

import numpy as np
import torch

from pipeline.evaluation import vision
from pipeline.evaluation.metrics.frechet import Moments, frechet_distance, moments
from tools.dev.benchmarks.harness import Bench, Contenders, Result, endless_rate, measure

FEATURES = 2048  # of Inception
SMALL = 128  # features and images of a short run, for tests
BATCH = 8  # images
OURS, SCIPY, FIDELITY = "this project", "scipy, sqrtm", "torch-fidelity"


def distances(bench: Bench) -> dict[str, Result]:
    """Measure the Fréchet distance of two sets of moments, and the features of one batch."""
    return {"frechet": frechet(bench), "inception": inception(bench)}


def scipys(a: Moments, b: Moments) -> float:
    """Return the distance as the first implementations of the FID compute it, by scipy's sqrtm."""
    import scipy.linalg

    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * np.trace(root))


def fidelitys(a: Moments, b: Moments) -> float:
    """Return torch-fidelity's distance."""
    vision.transforms()  # makes torchvision importable
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    one, other = ({"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (a, b))
    return float(next(iter(fid_statistics_to_metric(one, other, False).values())))


def frechet(bench: Bench) -> Result:
    """Measure the seconds of one Fréchet distance between moments on the host."""
    width = FEATURES if bench.seconds >= 1 else SMALL
    rng = np.random.default_rng(0)
    a, b = (moments(rng.standard_normal((2 * width, width)) + shift) for shift in (0.0, 0.1))
    values: dict[str, float] = {}

    def rate(name: str, distance: partial[float]) -> float:
        start = time.perf_counter()
        values[name] = distance()
        return 1 / (time.perf_counter() - start)

    ways = {OURS: frechet_distance, SCIPY: scipys, FIDELITY: fidelitys}
    contenders: Contenders = {name: partial(rate, name, partial(way, a, b)) for name, way in ways.items()}
    measured = measure(contenders, bench.repeats, {(OURS, SCIPY): 10.0, (OURS, FIDELITY): 2.5})
    apart = max(abs(value - values[OURS]) / values[OURS] for value in values.values())
    protocol = (
        f"Two sets of moments of {width} features, float64, {torch.get_num_threads()} threads, on the host. "
        f"The three values differ by {apart:.1e} of the value."
    )
    return {"title": "Fréchet distance", "unit": "distances/s", "protocol": protocol, **measured}


def random_weights() -> io.BytesIO:
    """Return a file of random weights for torch-fidelity's Inception: its speed does not depend on them."""
    vision.transforms()  # makes torchvision importable
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    empty, file = io.BytesIO(), io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None):
        net = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    torch.save(net.state_dict(), file)
    return file


def inception(bench: Bench) -> Result:
    """Measure images per second through Inception, and compare the features."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file = random_weights()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file.seek(0)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=file)
    file.seek(0)
    nets = {OURS: vision.inception(file).to(device), FIDELITY: theirs.to(device)}
    size = bench.config.shard.size
    count = BATCH if bench.seconds >= 1 else 1
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device).permute(
        0, 3, 1, 2
    )
    with torch.no_grad():
        one, other = (nets[name](images)[0] for name in (OURS, FIDELITY))
    apart = float((one - other).abs().max() / other.abs().max())

    @torch.no_grad()
    def rate(name: str) -> float:
        return endless_rate(partial(nets[name], images), bench.seconds / 2, count)

    contenders: Contenders = {name: partial(rate, name) for name in nets}
    measured = measure(contenders, bench.repeats, {(OURS, FIDELITY): 1.4}, warm_up=True)
    protocol = (
        f"Batches of {count} images of {size} pixels, enlarged to 299, random weights, fp32, "
        f"{torch.get_num_threads()} threads, device {device}. Ours: normalisations folded into the "
        f"convolutions, channels last. The features differ by {apart:.1e} of the largest."
    )
    return {"title": "Inception features", "unit": "images/s", "protocol": protocol, **measured}
