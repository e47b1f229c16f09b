#!/usr/bin/env python3
"""Runs `cargo bench --bench inception` and pytorch-fid's network in turn, and prints the ratio of their medians.

    PYTHON benches/peer/inception.py [--batch N] [--rounds N] [--threads N]

PYTHON is an interpreter with the packages of tests/data/generate/requirements.txt. Both compute features and logits of
bytes of 299 x 299 pixels. PyTorch runs in both memory layouts, and the faster counts.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/data/generate"))
import inception  # noqa: E402


def ours(weights, args):
    command = ["cargo", "bench", "-q", "--bench", "inception", "--", "--weights", weights, "--batch", str(args.batch),
               "--threads", str(args.threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])["ms_median"]


def theirs(network, classifier, pixels, layout):
    network = network.to(memory_format=layout)
    ms = []
    with torch.inference_mode():
        for run in range(4):
            start = time.perf_counter()
            images = (pixels / 255).to(memory_format=layout)
            network(images)[0].flatten(1) @ classifier
            ms.append(1e3 * (time.perf_counter() - start))
    return statistics.median(ms[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    state = inception.weights()
    network, _ = inception.networks(state)
    pixels = torch.randint(0, 256, (args.batch, 3, 299, 299), dtype=torch.uint8)
    layouts = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    mine, other = [], {name: [] for name in layouts}
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.safetensors"
        save_file(state, weights)
        for _ in range(args.rounds):
            mine.append(ours(weights, args))
            for name, layout in layouts.items():
                other[name].append(theirs(network, state["fc.weight"].T, pixels, layout))
    name = min(layouts, key=lambda name: statistics.median(other[name]))
    a, b = statistics.median(mine), statistics.median(other[name])
    print("| measure | this crate | PyTorch | ratio |\n| --- | --- | --- | --- |")
    print(f"| Inception, batch {args.batch} | {a:.0f} ms | {b:.0f} ms, {name} | {b / a:.2f} |")


main()
