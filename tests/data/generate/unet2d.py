"""Writes what diffusers' UNet2DModel computes with random weights.

    python unet2d.py OUT [NAME ...]
    python unet2d.py --names

Each network is a folder below OUT, as diffusers saves it, with one more file, `case.safetensors`. The content is
described in ../README.md. With `--names`, prints name and shape of each weight of google/ddpm-cifar10-32.
"""
import argparse
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

# Of the training step. With a small eps, Adam would turn rounding errors of small gradients into whole steps.
ADAM = {"lr": 1e-2, "eps": 1e-3}

# The options of published networks, with few channels.
PUBLISHED = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 2,
    "time_embedding_type": "positional",
}
NETWORKS = {
    "cifar10": PUBLISHED | {
        "sample_size": 8,
        "layers_per_block": 2,
        "block_out_channels": (4, 6, 4),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # google/ddpm-celebahq-256 and google/ddpm-church-256 have the same options, and one level more.
    "celebahq_church": PUBLISHED | {
        "sample_size": 32,
        "layers_per_block": 1,
        "block_out_channels": (4, 4, 6, 4, 4),
        "down_block_types": ("DownBlock2D",) * 3 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 3,
    },
    # The defaults of diffusers, and not square.
    "heads": {
        "sample_size": (8, 12),
        "in_channels": 1,
        "out_channels": 2,
        "layers_per_block": 1,
        "block_out_channels": (4, 8),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 2,
        "attn_norm_num_groups": 4,
    },
    "classes": {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (4, 8),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "norm_num_groups": 2,
        "num_class_embeds": 5,
        "center_input_sample": True,
        "add_attention": False,
    },
    "scale_shift": {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (4, 8),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 2,
        "norm_num_groups": 2,
        "norm_eps": 1e-3,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_dim": 12,
    },
}

# google/ddpm-cifar10-32
CIFAR10 = NETWORKS["cifar10"] | {
    "sample_size": 32,
    "norm_num_groups": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


def random_network(options):
    net = UNet2DModel(**options).eval()
    with torch.no_grad():
        for w in net.parameters():
            if w.dim() == 1:  # norms begin at exactly 1 and 0: move them, so that one swapped or left out shows
                w.add_(0.2 * torch.randn_like(w))
    return net


def case(net):
    """The output and the gradients are computed in float64. Leaves `net` as it was."""
    config = net.config
    size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
    batch = 1 if size[0] > 16 else 2
    x = torch.randn(batch, config.in_channels, *size)
    d_out = torch.randn(batch, config.out_channels, *size)
    t = torch.tensor([871, 3][:batch])
    inputs = {"x": x, "t": t, "d_out": d_out}
    classes = {}
    if config.num_class_embeds is not None:
        classes = {"class_labels": torch.tensor([1, config.num_class_embeds - 1])}
        inputs["classes"] = classes["class_labels"]
    net.double()
    out = net(x.double(), t, **classes).sample
    (out * d_out).sum().backward()
    grads = {f"grad.{name}": w.grad.float() for name, w in net.named_parameters()}
    net.zero_grad()
    net.float()  # exact: every weight came from float32
    return inputs | {"out": out.float()} | grads


def training(net):
    """One step of Adam on the mean squared error, with the gradient clipped to norm 1. Leaves `net` trained."""
    x_0, eps = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    t = torch.tensor([10, 500])
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    net.double()
    optimizer = torch.optim.Adam(net.parameters(), **ADAM)
    loss = torch.nn.functional.mse_loss(net(x_t, t).sample, eps.double())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    net.float()
    trained = {f"trained.{name}": w.detach() for name, w in net.named_parameters()}
    return {"train.x_0": x_0, "train.t": t, "train.eps": eps, "train.loss": loss.detach().float()} | trained


def names():
    with torch.device("meta"):
        net = UNet2DModel(**CIFAR10)
    for name, w in sorted(net.named_parameters()):
        print(name, list(w.shape))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--names", action="store_true")
    a = parser.parse_args()
    if a.names:
        return names()
    torch.set_num_threads(1)  # so that sums always run in the same order
    for name in a.networks:
        torch.manual_seed(list(NETWORKS).index(name))
        net = random_network(NETWORKS[name])
        net.save_pretrained(a.out / name)
        tensors = case(net)
        if name == "cifar10":
            tensors |= training(net)
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(tensors, a.out / name / "case.safetensors")
        print(f"{name}: {sum(w.numel() for w in net.parameters())} weights")


if __name__ == "__main__":
    main()
