"""The U-Net and the diffusion process in PyTorch, as plainly as they can be written.

The crate's network must have these weights, by name and shape, and compute these numbers. The order in which
modules are made is also fixed: it decides what a seed's random weights are.

Shapes: images (batch, channels, height, width) in [-1, 1]; timesteps (batch,), integers, 0 being the least noisy.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 8  # of every GroupNorm


@dataclass
class UNetConfig:
    image_size: int
    channels: int
    hidden_dims: list[int]  # the stem's width, then one a level, from the finest down
    time_dim: int
    attention_resolutions: list[int]  # levels that attend; level i works at image_size / 2^i
    dropout: float = 0.0  # of whole feature maps


def norm_act_conv(inputs, outputs):
    return nn.Sequential(nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))


class TimeEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # A buffer, to move with the module; of integers, since those keep their type where weights change theirs;
        # and no part of the state_dict, which holds weights only.
        self.register_buffer("k", torch.arange(dim // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, t):
        frequencies = torch.exp(-self.k.double() * (math.log(10000.0) / (len(self.k) - 1)))  # from 1 to 1/10000
        angles = torch.outer(t.double(), frequencies)
        waves = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    def __init__(self, inputs, outputs, config):
        super().__init__()
        self.block1 = norm_act_conv(inputs, outputs)
        self.block2 = norm_act_conv(outputs, outputs)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, outputs))
        self.dropout = nn.Dropout2d(config.dropout)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, temb):
        h = self.block1(x)
        h = h + self.time_emb(temb).unflatten(1, (-1, 1, 1))
        h = self.block2(self.dropout(h))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Every position attends to all positions of its image: one head, a residual connection around it."""

    attend = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1)  # (batch, 1 head, positions, 3 width)
        h = self.attend(*qkv.chunk(3, dim=-1))
        return x + self.proj(h.squeeze(1).mT.reshape(x.shape))


def maybe_attention(width, level, config):
    return Attention(width) if level in config.attention_resolutions else nn.Identity()


class DownBlock(nn.Module):
    def __init__(self, level, config):
        super().__init__()
        inputs, outputs = config.hidden_dims[level : level + 2]
        self.res1 = ResBlock(inputs, outputs, config)
        self.res2 = ResBlock(outputs, outputs, config)
        self.attn = maybe_attention(outputs, level, config)
        self.downsample = nn.Conv2d(outputs, outputs, 3, stride=2, padding=1)

    def forward(self, x, temb):
        skip = self.attn(self.res2(self.res1(x, temb), temb))
        return self.downsample(skip), skip


class Bottleneck(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_dims[-1]
        self.res1 = ResBlock(width, width, config)
        self.attn = Attention(width)
        self.res2 = ResBlock(width, width, config)

    def forward(self, x, temb):
        return self.res2(self.attn(self.res1(x, temb)), temb)


class UpBlock(nn.Module):
    """Undoes the level's DownBlock; both its input and its skip have the width of the level below."""

    def __init__(self, level, config):
        super().__init__()
        outputs, inputs = config.hidden_dims[level : level + 2]
        self.upsample = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.res1 = ResBlock(2 * inputs, outputs, config)
        self.res2 = ResBlock(outputs, outputs, config)
        self.attn = maybe_attention(outputs, level, config)

    def forward(self, x, skip, temb):
        x = self.upsample(F.interpolate(x, scale_factor=2, mode="nearest"))
        x = self.res1(torch.cat([x, skip], dim=1), temb)
        return self.attn(self.res2(x, temb))


class UNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        levels, stem = range(len(config.hidden_dims) - 1), config.hidden_dims[0]
        self.time_mlp = TimeEmbedding(config.time_dim)
        self.init_conv = nn.Conv2d(config.channels, stem, 3, padding=1)
        self.down_blocks = nn.ModuleList([DownBlock(i, config) for i in levels])
        self.bottleneck = Bottleneck(config)
        self.up_blocks = nn.ModuleList([UpBlock(i, config) for i in reversed(levels)])
        self.out_norm = nn.GroupNorm(GROUPS, stem)
        self.out_conv = nn.Conv2d(stem, config.channels, 3, padding=1)

    def forward(self, x, t):
        temb = self.time_mlp(t)
        h, skips = self.init_conv(x), []
        for down in self.down_blocks:
            h, skip = down(h, temb)
            skips.append(skip)
        h = self.bottleneck(h, temb)
        for up in self.up_blocks:
            h = up(h, skips.pop(), temb)
        return self.out_conv(F.silu(self.out_norm(h)))


def check_moves():
    """Fails if a tensor of the network stays behind when it is moved: the meta device, which computes shapes only,
    takes no tensor of another."""
    net = UNet(UNetConfig(8, 1, [8, 8], 8, [0])).to("meta")
    net(torch.empty(1, 1, 8, 8, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))


class LinearSchedule:
    """beta from `start` to `end`, both included, in float64."""

    def __init__(self, steps, start, end):
        self.betas = torch.linspace(start, end, steps, dtype=torch.float64)
        self.alphas = 1 - self.betas
        self.alpha_bars = self.alphas.cumprod(0)

    def noised(self, x_0, eps, t):
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps"""
        abar = self.alpha_bars[t].view(-1, 1, 1, 1)
        return (abar.sqrt() * x_0 + (1 - abar).sqrt() * eps).to(x_0.dtype)

    def denoised(self, x_t, eps, z, t):
        """x_{t-1} by Ho et al. 2020, algorithm 2: sigma_t^2 = beta_t, nothing clipped, no noise from t = 0."""
        x, beta = x_t.double(), self.betas[t]
        x = (x - beta / (1 - self.alpha_bars[t]).sqrt() * eps.double()) / self.alphas[t].sqrt()
        if t > 0:
            x = x + beta.sqrt() * z.double()
        return x.to(x_t.dtype)
