"""The importance-weighted bound on log p(x|y) (arXiv 1509.00519)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvae.losses import gaussian_nll, squared_error
from cvae.model import CVAE


@torch.no_grad()
def importance_weighted_bound(model: CVAE, x: Tensor, y: Tensor, noise: Tensor, s2: float) -> Tensor:
    """Return log (1/K) sum_k p(x|z_k,y) p(z_k|y) / q(z_k|x,y) -> [B], nats.

    Its expectation is at most log p(x|y). `noise` [K, B, D] is standard normal; `s2` is the decoder
    variance on the [-1, 1] scale.
    """
    q = model.encode(x, y)
    prior = model.prior(y)
    pixels = x[0].numel()
    log_weights = []
    for eps in noise:
        z = q.sample(eps)
        log_likelihood = -gaussian_nll(squared_error(x, model.decode(z, y)), 1, s2, pixels)
        log_weights.append(log_likelihood + prior.log_prob(z) - q.log_prob(z))
    return torch.stack(log_weights).logsumexp(0) - math.log(len(noise))
