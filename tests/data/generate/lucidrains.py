"""Writes networks of denoising-diffusion-pytorch with random weights, and what that package computes with them.

    python lucidrains.py OUT [NAME ...]

Each network is a file `NAME.pt` as the package or its user saves it, and a file `NAME.safetensors`. The content is
described in ../README.md.
"""
import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from PIL import Image
from safetensors.torch import save_file

# `unet` has the arguments of `Unet`, and `process` those of `GaussianDiffusion`.
CASES = {
    # The file of the trainer, with the package's defaults for all but the sizes.
    "trainer": {
        "unet": {"dim": 4, "dim_mults": (1,), "attn_heads": 2, "attn_dim_head": 3},
        "size": (5, 3),
        "process": {"timesteps": 100},
    },
    # The state dict of the process. Three levels, not square, and everything differs from level to level.
    "state": {
        "unet": {
            "dim": 4,
            "init_dim": 6,
            "dim_mults": (1, 2, 1),
            "channels": 1,
            "sinusoidal_pos_emb_theta": 500,
            "attn_heads": (1, 2, 3),
            "attn_dim_head": (4, 2, 1),
            "full_attn": (True, False, False),
        },
        "size": (8, 12),
        "process": {"timesteps": 60, "objective": "pred_noise", "beta_schedule": "cosine"},
    },
    # The state dict of the network. The process for such networks is another one.
    "network": {
        "unet": {
            "dim": 4,
            "dim_mults": (1, 1),
            "learned_variance": True,
            "learned_sinusoidal_cond": True,
            "learned_sinusoidal_dim": 6,
            "attn_heads": 2,
            "attn_dim_head": 3,
            "full_attn": (False, False),
        },
        "size": (4, 6),
        "gradients": True,
    },
}
# The same of version 1.11.1.
EARLIER = {
    "groups": {
        "unet": {"dim": 8, "dim_mults": (1,), "channels": 1, "attn_heads": 1, "attn_dim_head": 2, "full_attn": (False,)},
        "size": (5, 3),
        "process": {"timesteps": 30, "objective": "pred_x0", "beta_schedule": "linear"},
    },
}


def randomise(module, generator):
    """Replaces the weights: those of normalisations begin as ones in the package."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if name.endswith(".g"):
                weight.copy_(1 + 0.3 * values)
            elif name.endswith("mem_kv") or weight.ndim == 1:
                weight.copy_(values * 0.5)
            else:
                weight.copy_(values / weight[0].numel() ** 0.5)


def save_by_trainer(diffusion, path, generator):
    """Saves the process by the trainer, as the average. The weights of the last update are others."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(100):
            Image.new("RGB", diffusion.image_size).save(Path(folder) / f"{i}.png")
        trainer = Trainer(diffusion, folder, results_folder=folder, calculate_fid=False)
        trainer.ema.ema_model.load_state_dict(diffusion.state_dict())
        randomise(diffusion, generator)
        trainer.save(10)
        path.write_bytes((Path(folder) / "model-10.pt").read_bytes())
    return trainer.ema.ema_model


def make(name, case, out):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    unet = Unet(**case["unet"])
    randomise(unet, generator)
    tensors, metadata = {}, {key: case.get(key) for key in ["unet", "size", "process"]}
    path = out / f"{name}.pt"
    if "process" not in case:
        torch.save(unet.state_dict(), path)
    else:
        diffusion = GaussianDiffusion(unet, image_size=case["size"], sampling_timesteps=5, **case["process"])
        if name == "trainer":
            diffusion = save_by_trainer(diffusion, path, generator)
        else:
            torch.save(diffusion.state_dict(), path)
        unet = diffusion.model
        tensors["alpha_bars"] = diffusion.alphas_cumprod
        shape = (2, unet.channels, *case["size"])
        torch.manual_seed(0)
        tensors["start"] = torch.randn(shape)
        torch.manual_seed(0)
        tensors["sample"] = diffusion.ddim_sample(shape)

    steps = case.get("process", {}).get("timesteps", 1000)
    unet = unet.double()
    x = torch.randn(2, unet.channels, *case["size"], generator=generator)
    t = torch.tensor([3, steps - 1])
    y = unet(x.double(), t.double())
    tensors |= {"x": x, "t": t, "out": y}
    if case.get("gradients"):
        tensors["d_out"] = torch.randn(y.shape, generator=generator)
        (y * tensors["d_out"]).sum().backward()
        tensors |= {f"grad.{name}": weight.grad for name, weight in unet.named_parameters()}
    tensors = {
        name: (tensor.detach().float() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(tensors, out / f"{name}.safetensors", {"case": json.dumps(metadata)})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    cases = CASES if version("denoising-diffusion-pytorch").startswith("2.") else EARLIER
    for name in args.names or cases:
        make(name, cases[name], args.out)


if __name__ == "__main__":
    main()
