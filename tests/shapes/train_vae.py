"""Train the VAE of the tiny model on images of scenes.

The class is that of Qwen-Image. It sees single frames only, so of each causal convolution only the last slice in time
counts: it is trained as a convolution in two dimensions, and the other slices are zero. A first phase trains both
halves; a second one the decoder alone, from latents with noise, because those of a denoiser are never exact.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageResidualBlock
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

from tests.shapes.rendering import render
from tests.shapes.scenes import draw_scenes

CONFIG = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": [], "temperal_downsample": [False, True, True]}  # fmt: skip
BATCH = 8
RATE = 2e-3
WARM_UP = 100
KL_WEIGHT = 1e-4
EDGE_WEIGHT = 4.0
"""Weight of pixels at the edges of figures; with that of all others, crosses come out as diamonds."""
LATENT_NOISE = 0.1
"""Standard deviation of the noise of the second phase, in normalized latents."""


@contextmanager
def single_frames() -> Iterator[None]:
    """Compute causal convolutions of single frames in two dimensions."""
    real = QwenImageCausalConv3d.forward

    def flat(self: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        assert x.shape[2] == 1 and cache_x is None
        padding = (self._padding[2], self._padding[0])
        return conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding)[:, :, None]

    QwenImageCausalConv3d.forward = flat
    try:
        yield
    finally:
        QwenImageCausalConv3d.forward = real


def new_vae(seed: int) -> AutoencoderKLQwenImage:
    """Return a VAE with the initial weights; with those of the class, training does not begin."""
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage(**CONFIG)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, QwenImageCausalConv3d | torch.nn.Conv2d):
                kernel = module.weight[:, :, -1] if module.weight.dim() == 5 else module.weight
                spread = math.sqrt(2 / kernel[0].numel())
                module.weight.zero_()
                kernel.normal_(0, spread)
                module.bias.zero_()
        for module in vae.modules():
            if isinstance(module, QwenImageResidualBlock):
                module.conv2.weight.mul_(0.5)
    return vae


def encode(vae: AutoencoderKLQwenImage, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and logarithm of the variance of the latents, each `[B, 16, 1, 8, 8]`."""
    mean, logvar = vae.quant_conv(vae.encoder(pixels)).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Return pixels `[B, 3, 1, 64, 64]`."""
    return vae.decoder(vae.post_quant_conv(latents))


def images(number: int, seed: int, held_out: bool = False) -> Tensor:
    """Return images of scenes, `[N, 3, 1, 64, 64]` in [-1, 1]."""
    scenes = draw_scenes(number, seed, held_out)
    rendered = np.stack([np.asarray(render(scene, index)) for index, scene in enumerate(scenes)])
    return torch.from_numpy(rendered).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def error(found: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean of absolute and squared error, where edges count more."""
    flat = pixels[:, :, 0]
    spread = max_pool2d(flat, 3, 1, 1) + max_pool2d(-flat, 3, 1, 1)  # largest minus smallest around each
    weight = 1 + (EDGE_WEIGHT - 1) * (spread.amax(dim=1, keepdim=True) > 0.05)
    off = (found - pixels)[:, :, 0]
    return ((off.abs() + off.square()) * weight).sum() / (weight.sum() * off.shape[1])


def rate_at(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: warm-up, then cosine to 0."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def optimize(parameters: list[torch.nn.Parameter], steps: int, loss_of, name: str) -> None:
    """Take steps of AdamW; `loss_of` gives the loss at a step."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    begun = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_at(step, steps)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            rate = (step + 1) * BATCH / (time.monotonic() - begun)
            print(f"{name} {step}: loss {float(loss.detach()):.4f}, {rate:.0f} images/s", flush=True)


def train(vae: AutoencoderKLQwenImage, pixels: Tensor, steps: int, decoder_steps: int, seed: int) -> None:
    """Train both halves, then the decoder alone; writes mean and spread of the latents into the configuration."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        return pixels[torch.randint(len(pixels), (BATCH,), generator=generator)]

    def both(step: int) -> Tensor:
        shown = batch()
        mean, logvar = encode(vae, shown)
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error(decode(vae, latents), shown) + KL_WEIGHT * kl

    optimize(list(vae.parameters()), steps, both, "both")
    mean, spread = latent_statistics(vae, pixels)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=spread.tolist())

    def decoder(step: int) -> Tensor:
        shown = batch()
        with torch.no_grad():
            latents, _ = encode(vae, shown)
        noise = torch.randn(latents.shape, generator=generator) * spread.view(1, -1, 1, 1, 1)
        return error(decode(vae, latents + LATENT_NOISE * noise), shown)

    optimize([*vae.decoder.parameters(), *vae.post_quant_conv.parameters()], decoder_steps, decoder, "decoder")


@torch.no_grad()
def spread_latents(vae: AutoencoderKLQwenImage, seed: int) -> None:
    """Scale and shift each channel of the latents, and undo it in the decoder: the images stay the same.

    Trained latents have a mean near 0 and a spread near 1, so that a trainer that forgets to normalize them would
    hardly be noticed.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = vae.config.z_dim
    scale = 3.0 ** (2 * torch.rand(channels, generator=generator) - 1)
    offset = 2 * torch.randn(channels, generator=generator)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    into.bias[:channels] = into.bias[:channels] * scale + offset
    into.bias[channels:] += 2 * scale.log()
    out.weight /= scale.view(1, -1, 1, 1, 1)
    out.bias -= out.weight[:, :, 0, 0, 0] @ offset
    mean, spread = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    vae.register_to_config(latents_mean=(mean * scale + offset).tolist(), latents_std=(spread * scale).tolist())


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLQwenImage, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of the latents, each `[16]`."""
    latents = torch.cat([encode(vae, part)[0] for part in pixels[:1000].split(100)])
    return latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))


def train_vae(number: int, steps: int, decoder_steps: int) -> AutoencoderKLQwenImage:
    """Return a VAE trained on so many images, with both halves for `steps`, then the decoder alone."""
    vae = new_vae(seed=0)
    with single_frames():
        train(vae, images(number, seed=0), steps, decoder_steps, seed=0)
    spread_latents(vae, seed=0)
    return vae
