"""Failures that a training survives without an error, seen in its validation values."""

from __future__ import annotations

from cvae.config import ModelConfig


def log_det_limit(model: ModelConfig) -> float:
    """Return half of the largest |log det| that the flow can reach, nats; beyond it the flow saturates.

    The tanh of each coupling layer bounds the log-determinant of half of z's dimensions.
    """
    flow = model.prior.flow
    return 0.5 * flow.layers * flow.bound * model.z_dim / 2


def complaints(values: dict[str, float], model: ModelConfig) -> list[str]:
    """Return one sentence for each failure, with the configuration keys that mend it.

    `values` are those of the averaged weights (`val_ema/...`), once the KL term's weight is 1.
    """
    kl = values["val_ema/kl"]
    units = values["val_ema/active_units"]
    s2 = values["val_ema/s2"]
    floor = model.variance.floor
    limit = log_det_limit(model)
    log_det = max(abs(values["val_ema/log_det_min"]), abs(values["val_ema/log_det_max"]))
    found = []
    if units == 0 or kl < 0.01 * model.z_dim:
        found.append(
            f"KL collapse: {kl:.3g} nats in {model.z_dim} latent units, {units:.0f} of them active, "
            "so the latent code carries no information about the image; raise train.kl_warmup_images, "
            "lower optim.lr, or set model.variance.name=optimal, which weighs reconstruction more"
        )
    if model.variance.name != "unit" and s2 <= 2 * floor:
        found.append(
            f"variance collapse: the decoder variance {s2:.3g} has reached its floor {floor:.3g}, "
            "so the loss is no likelihood any more; look for constant or duplicate images, "
            "or set model.variance.floor to the noise of the pixels"
        )
    if model.prior.name == "flow" and log_det > limit:
        found.append(
            f"log-determinant {log_det:.4g} is beyond half of its bound {2 * limit:.4g}: "
            "the flow's scales saturate; lower optim.lr, or raise model.prior.flow.bound"
        )
    return found
