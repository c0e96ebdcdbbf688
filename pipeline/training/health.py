"""What a training that still runs may be silently getting wrong, seen in its validation: one sentence each, with what to change."""

from __future__ import annotations

from cvae.config import ModelConfig


def log_det_limit(model: ModelConfig) -> float:
    """Half of what |log det| of the flow can reach (each layer's tanh keeps it): beyond it its scales saturate; nats."""
    return 0.5 * model.prior.flow.layers * model.prior.flow.bound * model.z_dim / 2


def complaints(values: dict[str, float], model: ModelConfig) -> list[str]:
    """Collapses visible in the validation numbers of the averaged weights (`val_ema/...`), after the KL weight has reached 1."""
    kl, units, s2 = (values[f"val_ema/{name}"] for name in ("kl", "active_units", "s2"))
    floor, limit = model.variance.floor, log_det_limit(model)
    steepest = max(abs(values[f"val_ema/log_det_{end}"]) for end in ("min", "max"))
    found = []
    if units == 0 or kl < 0.01 * model.z_dim:
        found.append(
            f"KL collapse: {kl:.3g} nats in {model.z_dim} latent units, {units:.0f} of them active, so the images are not encoded; "
            "raise train.kl_warmup_images, lower optim.lr, or use model.variance.name=optimal, which weighs reconstruction more"
        )
    if model.variance.name != "unit" and s2 <= 2 * floor:
        found.append(
            f"variance collapse: the decoder variance {s2:.3g} is at its floor {floor:.3g}, so the loss is no likelihood any more; "
            "look for constant or duplicate images, or set model.variance.floor to the noise that the pixels have"
        )
    if model.prior.name == "flow" and steepest > limit:
        found.append(
            f"log-determinant {steepest:.4g} is beyond half of its bound {2 * limit:.4g}: the flow's scales saturate; "
            "lower optim.lr, or raise model.prior.flow.bound"
        )
    return found
