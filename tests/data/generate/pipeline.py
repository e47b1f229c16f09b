"""Opens a folder that the example `convert` wrote, and writes what diffusers computes with its network.

    python pipeline.py FOLDER

The file FOLDER/unet/case.safetensors is described in ../README.md. With DDPM_DIFFUSERS=FOLDER, `tests/pytorch_parity.rs`
compares the crate with it.
"""
import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from unet2d import case


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    unet, scheduler = pipeline.unet.eval(), pipeline.scheduler
    print(f"{type(pipeline).__name__}, {type(scheduler).__name__}, {sum(w.numel() for w in unet.parameters())} weights")
    # Options that the classes do not know would be ignored with a warning.
    for part, name in [(unet, "unet/config.json"), (scheduler, "scheduler/scheduler_config.json")]:
        written = json.loads((folder / name).read_text())
        unknown = [key for key in written if not key.startswith("_") and key not in part.config]
        print(f"{name}: {len(written)} options, unknown {unknown}")
    if unet.config.num_class_embeds is None:
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(batch_size=1, num_inference_steps=3, output_type="np").images
        print(f"an image of shape {image.shape} in 3 steps, from {image.min():.3f} to {image.max():.3f}")
    tensors = {key: value.detach().contiguous() for key, value in case(unet).items()}
    save_file(tensors, folder / "unet" / "case.safetensors")


if __name__ == "__main__":
    main()
