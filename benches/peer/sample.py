#!/usr/bin/env python3
"""Measures the time from the start of a process to digits in a file, for the example `sample` and for PyTorch in turn.

    PYTHON benches/peer/sample.py CHECKPOINT [--count N] [--steps N] [--rounds N] [--threads N]

PYTHON is an interpreter with the packages of tests/data/generate/requirements.txt. CHECKPOINT is a directory that the
example `mnist` wrote. Both programs draw with its averaged weights, by DDIM with even steps and clipped images. PyTorch
runs in both memory layouts, and the faster counts.
"""
import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draw", type=pathlib.Path, metavar="FILE.png", help="draws by PyTorch, and measures nothing")
    parser.add_argument("--channels-last", action="store_true", help="the memory layout of --draw")
    args = parser.parse_args()
    if args.draw:
        draw(args)
    else:
        compare(args)


def compare(args):
    subprocess.run(["cargo", "build", "-q", "--release", "--example", "sample"], cwd=ROOT, check=True)
    # All paths are absolute, because the programs run in the directory of the repository.
    checkpoint = args.checkpoint.resolve()
    sizes = [f"--count={args.count}"]
    ours = [ROOT / "target/release/examples/sample", "--cpu", "--checkpoint", checkpoint, "--solver", "ddim",
            "--spacing", "even", "--sampling-steps", str(args.steps), *sizes, "--out"]
    peer = [sys.executable, __file__, checkpoint, *sizes, f"--steps={args.steps}", f"--threads={args.threads}"]
    ways = {"this crate": ours, "PyTorch": [*peer, "--draw"],
            "PyTorch, channels last": [*peer, "--channels-last", "--draw"]}
    seconds = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(args.rounds):
            for way, command in ways.items():
                start = time.perf_counter()
                subprocess.run([*command, pathlib.Path(directory) / "digits.png"], cwd=ROOT, check=True,
                               stdout=subprocess.DEVNULL, env=os.environ | {"RAYON_NUM_THREADS": str(args.threads)})
                seconds[way].append(time.perf_counter() - start)
    for way, times in seconds.items():
        print(f"{way}: {', '.join(f'{t:.2f} s' for t in times)}")
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    mine = medians.pop("this crate")
    print(f"ratio to the faster layout: {min(medians.values()) / mine:.2f}")


def draw(args):
    # Imported here, because the other process needs no PyTorch.
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    sys.path.insert(0, str(ROOT / "tests/data/generate"))
    from reference import UNet, UNetConfig

    torch.set_num_threads(args.threads)
    settings = json.loads((args.checkpoint / "checkpoint.json").read_text())
    config, diffusion = settings["network"]["config"], settings["diffusion"]
    net = UNet(UNetConfig(**config)).eval()
    net.load_state_dict(load_file(args.checkpoint / "ema.safetensors"))
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)
    alpha_bars = schedule(torch, diffusion["schedule"])
    size = (args.count, config["channels"], config["image_size"], config["image_size"])
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    last = len(alpha_bars) - 1
    timesteps = [round(last * i / (args.steps - 1)) for i in reversed(range(args.steps))]
    with torch.no_grad():
        for t, before in zip(timesteps, [*timesteps[1:], None]):
            x = step(net(x, torch.full((args.count,), t)), x, alpha_bars[t],
                     1.0 if before is None else alpha_bars[before], diffusion["prediction"])
    rows = x.clamp(-1, 1).add(1).mul(127.5).round().byte()[:, 0]
    columns = math.isqrt(args.count)
    rows = torch.cat([torch.cat([*row], dim=1) for row in rows[: columns * (args.count // columns)].split(columns)])
    Image.fromarray(rows.numpy()).save(args.draw)


def schedule(torch, schedule):
    """The products of 1 - beta of the linear (Ho et al. 2020) or the cosine schedule (Nichol and Dhariwal 2021)."""
    (kind, values), = schedule.items()
    if kind == "linear":
        betas = torch.linspace(values["beta_start"], values["beta_end"], values["steps"], dtype=torch.float64)
    elif kind == "cosine":
        angles = (torch.arange(values["steps"] + 1, dtype=torch.float64) / values["steps"] + 0.008) / 1.008
        squares = torch.cos(angles * math.pi / 2) ** 2
        betas = (1 - squares[1:] / squares[:-1]).clamp(max=0.999)
    else:
        sys.exit(f"error: the schedule is {kind}; it must be linear or cosine")
    return torch.cumprod(1 - betas, 0).tolist()


def step(output, x, now, before, prediction):
    """One step of DDIM (Song et al. 2021, equation 12, without noise)."""
    if prediction == "velocity":
        x_0 = now**0.5 * x - (1 - now) ** 0.5 * output
    else:
        x_0 = (x - (1 - now) ** 0.5 * output) / now**0.5
    x_0 = x_0.clamp(-1, 1)
    noise = (x - now**0.5 * x_0) / (1 - now) ** 0.5
    return before**0.5 * x_0 + (1 - before) ** 0.5 * noise


main()
