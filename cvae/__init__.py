"""The model: a conditional VAE with an analytic decoder variance and a conditional prior.

It needs torch, safetensors and the standard library only. `cvae.load` opens an exported model. Letters in
shapes: B images of a batch, C channels, H = W pixels of a side, P = C*H*W, A attributes, D latent
dimensions, E size of e(y). Images are in [-1, 1]. Values are in nats per image unless their name says
otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvae.io import FilePath
    from cvae.use import Model


def load(path: FilePath, device: str = "cpu") -> Model:
    """Open an exported folder, or a run directory in which `tools/export.py` has written one.

    Raises `cvae.io.ModelFileError`, a ValueError, if the files are missing or damaged.
    """
    # The import waits, because `cvae.config` must stay usable without torch.
    from cvae.io import read
    from cvae.use import Model

    net, card = read(path)
    return Model(net, card, device)
