"""One training step: this project's against the loops of PyTorch-VAE, sigma-vae-pytorch and pythae."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from cvae.model import CVAE
from pipeline.runtime.distributed import process_group
from tools.dev.benchmarks.harness import Bench, Contenders, Result, endless_rate, measure
from tools.dev.benchmarks.peers import loops
from tools.dev.benchmarks.train import BareStep

PASS = 4  # batches of one pass of pythae's trainer
FASTER, PLAIN = 2.0, 1.25  # targets in the fastest precision of this project, and in fp32


def training(bench: Bench) -> dict[str, Result]:
    """Measure images per second of a step on one batch in memory."""
    config, size = bench.config, bench.config.shard.size
    batch = config.train.batch_size
    channels = list(config.model.net.channels)

    def network() -> loops.PlainVae:
        return loops.PlainVae(size, channels, config.model.z_dim).to(ranks.device)

    with process_group(60, config.train.threads) as ranks:
        own = {f"this project, {p}": BareStep(bench, p, ranks) for p in bench.precisions}
        x = torch.rand(batch, 3, size, size, device=ranks.device) * 2 - 1
        steps = {
            "PyTorch-VAE's loop": (loops.pytorch_vae(network(), x), 1),
            "sigma-vae-pytorch's loop": (loops.sigma_vae(network(), x), 1),
            "pythae": (loops.pythae(network(), x, bench.folder / "pythae", PASS), PASS),
        }
        contenders: Contenders = {name: partial(step.rate, step.steps) for name, step in own.items()}
        for name, (step, batches) in steps.items():
            contenders[name] = partial(endless_rate, step, bench.seconds, batches * batch)
        ratios: dict[tuple[str, str], float] = {}
        for name in own:
            target = PLAIN if name.endswith("fp32") else FASTER
            ratios |= {(name, peer): target for peer in steps}
        measured = measure(contenders, bench.repeats, ratios, warm_up=True)
        threads = torch.get_num_threads()
    protocol = (
        f"Batch {batch} of {size} pixels in memory, {threads} threads, device {ranks.device}. Peers train in "
        f"fp32, as they do by default. {flops(config.name, bench, network())} PyTorch-VAE and "
        "sigma-vae-pytorch are not on PyPI: minimal loops stand for them. pythae's trainer passes over "
        f"{PASS} batches."
    )
    return {"training": {"title": "Training step", "unit": "images/s", "protocol": protocol, **measured}}


def flops(name: str, bench: Bench, plain: loops.PlainVae) -> str:
    """Say how many operations the forward pass of both models takes for an image."""
    size, settings = bench.config.shard.size, bench.config.model
    attributes = bench.celeba.labels.shape[1]
    # The counter knows no operation of oneDNN, which takes only float32.
    model = CVAE(settings, size, attributes).double()
    images = torch.zeros(2, 3, size, size).double()
    y, noise = torch.zeros(2, attributes).double(), torch.zeros(2, model.noise_width).double()
    with FlopCounterMode(display=False) as ours:
        model.terms(images, y, noise)
    with FlopCounterMode(display=False) as theirs:
        plain.cpu().double()(images)
    own, other = ours.get_total_flops() / 2e6, theirs.get_total_flops() / 2e6
    return (
        f"The peers' network has this project's convolutions and neither attributes nor flow: "
        f"{other:.1f} MFLOP an image forward, {name} {own:.1f}."
    )
