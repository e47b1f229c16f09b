"""Writes what the U-Net of improved-diffusion and guided-diffusion computes with weights from a formula.

    python openai.py OUT

The network is written anew from the papers (Nichol and Dhariwal 2021; Dhariwal and Nichol 2021, section 3), with the
names of weights of those programs. The content of the file is described in ../README.md.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

DEFAULTS = {
    "image_size": 8,
    "channels": 32,
    "mult": [1, 2],
    "layers": 1,
    "attention": [2],  # the factors by which maps with attention are smaller than the image
    "heads": 1,
    "head_channels": None,
    "new_attention_order": False,
    "scale_shift": False,
    "by_block": False,
    "classes": None,
    "out_channels": 3,
    "time_scale": 1,  # 1000 / T with rescale_timesteps
}
CASES = {
    "improved": {"layers": 2, "mult": [1, 2, 2], "heads": 4, "attention": [2, 4], "out_channels": 6},
    "unconditional": {"attention": [1, 4], "mult": [1, 2, 1], "head_channels": 16, "scale_shift": True,
                      "by_block": True, "out_channels": 6},
    "classes": {"mult": [1, 1], "heads": 2, "new_attention_order": True, "scale_shift": True, "classes": 5},
    "blocks": {"attention": [], "by_block": True, "heads": 1},
    "rescaled": {"attention": [], "time_scale": 0.25},
    # Heads of 16 and of 24 channels: levels of different widths, as in improved-diffusion's network for ImageNet-64.
    "widths": {"mult": [1, 2, 3], "heads": 4, "attention": [2, 4], "scale_shift": True},
}


class Weights:
    """Weights by name, each from a formula of its name and its shape when it is first used."""

    def __init__(self):
        self.shapes = {}

    def __call__(self, name, *shape):
        self.shapes[name] = list(shape)
        key = 0xCBF29CE484222325  # the hash FNV-1a of the name
        for byte in name.encode():
            key = (key ^ byte) * 0x100000001B3 % 2**64
        # SplitMix64
        z = np.uint64(key) + np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        u = (z >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
        if len(shape) > 1:
            values = u * math.sqrt(12 / math.prod(shape[1:]))
        else:  # a bias, or the weight of a normalisation
            values = u * 0.5 + float(name.endswith(".weight"))
        return torch.from_numpy(values.astype(np.float32).astype(np.float64).reshape(shape))


def conv(w, name, x, out, size=3, stride=1):
    weight = w(f"{name}.weight", out, x.shape[1], size, size)
    return F.conv2d(x, weight, w(f"{name}.bias", out), stride, size // 2)


def linear(w, name, x, out):
    return F.linear(x, w(f"{name}.weight", out, x.shape[1]), w(f"{name}.bias", out))


def norm(w, name, x):
    channels = x.shape[1]
    return F.group_norm(x, 32, w(f"{name}.weight", channels), w(f"{name}.bias", channels), 1e-5)


def resize(x, change):
    if change == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if change == "up" else x


def block(w, s, name, x, emb, out, change=None):
    h = resize(F.silu(norm(w, f"{name}.in_layers.0", x)), change)
    h = conv(w, f"{name}.in_layers.2", h, out)
    e = linear(w, f"{name}.emb_layers.1", F.silu(emb), 2 * out if s["scale_shift"] else out)[:, :, None, None]
    if s["scale_shift"]:
        scale, shift = e.chunk(2, 1)
        h = norm(w, f"{name}.out_layers.0", h) * (1 + scale) + shift
    else:
        h = norm(w, f"{name}.out_layers.0", h + e)
    h = conv(w, f"{name}.out_layers.3", F.silu(h), out)
    x = resize(x, change)
    return h + (x if x.shape[1] == out else conv(w, f"{name}.skip_connection", x, out, 1))


def attention(w, s, name, x):
    batch, channels = x.shape[:2]
    heads = channels // s["head_channels"] if s["head_channels"] else s["heads"]
    flat = x.reshape(batch, channels, -1)
    qkv = F.conv1d(norm(w, f"{name}.norm", flat), w(f"{name}.qkv.weight", 3 * channels, channels, 1),
                   w(f"{name}.qkv.bias", 3 * channels))
    if s["new_attention_order"]:
        qkv = qkv.reshape(batch, 3, heads, channels // heads, -1).transpose(1, 2)
    else:
        qkv = qkv.reshape(batch, heads, 3, channels // heads, -1)
    q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(2))
    y = (q @ k.transpose(-1, -2) / math.sqrt(channels // heads)).softmax(-1) @ v
    y = y.transpose(-1, -2).reshape(batch, channels, -1)
    y = F.conv1d(y, w(f"{name}.proj_out.weight", channels, channels, 1), w(f"{name}.proj_out.bias", channels))
    return x + y.reshape(x.shape)


def network(w, s, x, t, y):
    first = s["channels"]
    angles = s["time_scale"] * t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(first // 2).double() / (first // 2))
    emb = linear(w, "time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * first)
    emb = linear(w, "time_embed.2", F.silu(emb), 4 * first)
    if y is not None:
        emb = emb + w("label_emb.weight", s["classes"], 4 * first)[y]
    h = conv(w, "input_blocks.0.0", x, first)
    skips, n, smaller = [h], 1, 1
    for level, mult in enumerate(s["mult"]):
        for _ in range(s["layers"]):
            h = block(w, s, f"input_blocks.{n}.0", h, emb, mult * first)
            if smaller in s["attention"]:
                h = attention(w, s, f"input_blocks.{n}.1", h)
            skips.append(h)
            n += 1
        if level + 1 < len(s["mult"]):
            if s["by_block"]:
                h = block(w, s, f"input_blocks.{n}.0", h, emb, mult * first, "down")
            else:
                h = conv(w, f"input_blocks.{n}.0.op", h, mult * first, stride=2)
            skips.append(h)
            n, smaller = n + 1, 2 * smaller
    h = block(w, s, "middle_block.0", h, emb, h.shape[1])
    h = attention(w, s, "middle_block.1", h)
    h = block(w, s, "middle_block.2", h, emb, h.shape[1])
    n = 0
    for level, mult in reversed(list(enumerate(s["mult"]))):
        for layer in range(s["layers"] + 1):
            name, part = f"output_blocks.{n}", 1
            h = block(w, s, f"{name}.0", torch.cat([h, skips.pop()], 1), emb, mult * first)
            if smaller in s["attention"]:
                h = attention(w, s, f"{name}.1", h)
                part = 2
            if level > 0 and layer == s["layers"]:
                if s["by_block"]:
                    h = block(w, s, f"{name}.{part}", h, emb, mult * first, "up")
                else:
                    h = conv(w, f"{name}.{part}.conv", resize(h, "up"), mult * first)
                smaller //= 2
            n += 1
    return conv(w, "out.2", F.silu(norm(w, "out.0", h)), s["out_channels"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors, cases = {}, {}
    for name, changes in CASES.items():
        s, w = DEFAULTS | changes, Weights()
        x, t = torch.randn(2, 3, s["image_size"], s["image_size"]), torch.tensor([3, 871])
        y = torch.tensor([1, s["classes"] - 1]) if s["classes"] else None
        tensors |= {f"{name}.x": x, f"{name}.out": network(w, s, x.double(), t, y).float()}
        cases[name] = s | {"t": t.tolist(), "y": None if y is None else y.tolist(), "weights": w.shapes}
    save_file(tensors, out, {"cases": json.dumps(cases)})


if __name__ == "__main__":
    main()
