"""Tiny autoencoders, untrained, in folders as diffusers writes them."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

SCALING = 0.5


def write_autoencoder(folder: Path, channels: int = 3, latent_channels: int = 4, levels: int = 2, seed: int = 0) -> Path:
    """The folder; images of `channels` become latents of half the width for each level after the first."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            latent_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(4,) * levels,
            norm_num_groups=2,
            scaling_factor=SCALING,
        )
    model.save_pretrained(folder)
    return folder
