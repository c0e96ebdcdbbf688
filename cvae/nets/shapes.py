"""Which sizes of nets, codes and images fit together. It needs no torch, so a launch can ask at once."""

from __future__ import annotations

from cvae.config import TOKEN_CONDITIONER_NAMES, ModelConfig, ResidualConfig


def require_fit(config: ModelConfig, image_size: int) -> None:
    """Raise ValueError unless nets and prior of a model fit its code and images of `image_size` pixels."""
    nets = (config.encoder.name, config.decoder.name)
    if "conv" in nets:
        halvings(image_size, len(config.net.channels))
    if "residual" in nets:
        sides = level_sides(config, image_size)
        if config.residual.grid:
            cell_channels(config.residual, config.z_dim, sides[-1])
    require_prior_fits(config, image_size)


def middle_map(config: ModelConfig, image_size: int) -> tuple[int, int]:
    """Return channels and side of the decoder's map in the middle. Raises ValueError if it has none."""
    if config.decoder.name != "residual":
        raise ValueError(
            f"prior.anomaly=true needs model.decoder.name=residual, got {config.decoder.name}; change one"
        )
    sides, channels = level_sides(config, image_size)[::-1], config.residual.channels[::-1]
    middle = len(sides) // 2
    return channels[middle], sides[middle]


def require_prior_fits(config: ModelConfig, image_size: int) -> None:
    """Raise ValueError unless the prior of a model fits its code and its conditioner."""
    if config.prior.name == "flow_matching" and config.prior.flow_matching.net == "grid":
        _require_grid(config, image_size)
    if config.prior.anomaly:
        middle_map(config, image_size)
    if config.prior.name in ("gaussian", "flow") and config.prior.net == "conv1d":
        require_embeddings(config)


def _require_grid(config: ModelConfig, image_size: int) -> None:
    """Raise ValueError unless codes are the grid that a velocity of grids works on."""
    if config.encoder.name != "residual" or not config.residual.grid:
        raise ValueError(
            "prior.flow_matching.net=grid needs codes that are a grid, but those of this encoder are vectors;"
            " set it to vector, or set model.residual.grid=true with the nets residual"
        )
    side, rest = divmod(image_size, 2 ** len(config.residual.channels))
    if rest:
        return  # a fault of the nets, told as theirs
    if config.prior.flow_matching.side != side:
        raise ValueError(
            f"prior.flow_matching.side: got {config.prior.flow_matching.side}, but codes are a grid of"
            f" {side}x{side} cells; set it to {side}"
        )
    velocity_channels(config.z_dim, side)


def halvings(size: int, times: int) -> list[int]:
    """Return the side lengths after 0, 1, ... stride-2 convolutions (kernel 4, padding 1).

    64 pixels give [64, 32, 16, ...]. Raises ValueError if fewer than 2 pixels would be left.
    """
    sizes = [size]
    for _ in range(times):
        sizes.append(sizes[-1] // 2)
    if sizes[-1] < 2:
        raise ValueError(
            f"model.net.channels: {times} halvings of a {size} pixel image leave {sizes[-1]} pixels, "
            "expected at least 2; use fewer entries"
        )
    return sizes


def level_sides(config: ModelConfig, image_size: int) -> list[int]:
    """Return the side of each level's feature map, large to small, pixels.

    Raises ValueError if the levels of the two nets differ, if the image cannot be halved that often, or if
    attention does not fit the levels.
    """
    net = config.residual
    if not net.channels:
        raise ValueError("model.residual.channels: is empty, expected one entry for each level")
    for key, blocks in (("encoder_blocks", net.encoder_blocks), ("decoder_blocks", net.decoder_blocks)):
        if len(blocks) != len(net.channels):
            raise ValueError(
                f"model.residual.{key}: {blocks} has {len(blocks)} entries, but model.residual.channels has"
                f" {len(net.channels)} levels; give each level a number of blocks"
            )
    last, rest = divmod(image_size, 2 ** len(net.channels))
    if rest or last < 1:
        raise ValueError(
            f"model.residual.channels: {len(net.channels)} halvings need an image size that is a multiple of"
            f" {2 ** len(net.channels)}, got {image_size}; use fewer entries or another shard.size"
        )
    sides = [image_size // 2 ** (i + 1) for i in range(len(net.channels))]
    _check_attention(config, sides)
    return sides


def _check_attention(config: ModelConfig, sides: list[int]) -> None:
    net, conditioner = config.residual, config.conditioner.name
    for key, wanted in (("cross_attention", net.cross_attention), ("self_attention", net.self_attention)):
        unknown = sorted(set(wanted) - set(sides))
        if unknown:
            raise ValueError(
                f"model.residual.{key}: no level has the side {unknown[0]}, expected some of {sides}"
            )
    if net.cross_attention and conditioner not in TOKEN_CONDITIONER_NAMES:
        raise ValueError(
            "model.residual.cross_attention needs one vector per attribute, but"
            f" model.conditioner.name={conditioner}; set it to {' or '.join(TOKEN_CONDITIONER_NAMES)}"
        )
    if not net.modulated and not net.cross_attention:
        raise ValueError(
            "model.residual.modulated=false: nothing would tell the nets the attributes;"
            " name levels in model.residual.cross_attention"
        )


def cell_channels(net: ResidualConfig, z_dim: int, side: int) -> int:
    """Channels of one cell of a grid code. Raises ValueError if `z_dim` does not fill the grid evenly."""
    if z_dim % side**2:
        raise ValueError(
            f"model.z_dim: {z_dim} does not fill {side}x{side} cells evenly;"
            f" model.residual.grid needs a multiple of {side**2}"
        )
    return z_dim // side**2


def velocity_channels(z_dim: int, side: int) -> int:
    """Channels of one cell of a code for a velocity of grids. Raises ValueError if the code is no grid."""
    channels, rest = divmod(z_dim, side**2)
    if rest or side % 2:
        raise ValueError(
            f"prior.flow_matching.side: z of {z_dim} dimensions is no grid of {side}x{side}"
            " cells with an even side; set prior.flow_matching.net=vector, or use fewer levels"
        )
    return channels


def require_embeddings(config: ModelConfig) -> None:
    """Raise ValueError if the prior's net `conv1d` has no attribute embeddings to run along."""
    if config.conditioner.name != "embedding":
        raise ValueError(
            "prior.net=conv1d runs along attribute embeddings, "
            f"but model.conditioner.name={config.conditioner.name}; set model.conditioner.name=embedding"
        )
