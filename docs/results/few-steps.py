#!/usr/bin/env python3
"""Measures the solvers at few sampling steps, and draws the first digits of each.

    docs/results/few-steps.py --data DIR --checkpoint DIR --classifier FILE [--count N] --out DIR

Runs the built examples mnist-fd and sample for each solver and number of steps. Writes DIR/few-steps.png and prints a
Markdown table of mnist-fd. Results that exist in DIR are not computed again. Needs Pillow.
"""
import argparse
import json
import pathlib
import subprocess
import sys

from PIL import Image, ImageDraw

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "target/release/examples"
STEPS = [5, 8, 10, 15, 20, 50]
# The name of a row, its options, the spacing of its timesteps, and the numbers of sampling steps. Heun and EDM evaluate
# the network twice per step.
SOLVERS = [
    ("DDIM", ["--solver", "ddim", "--eta", "0"], "even", [*STEPS, 100]),
    ("DDIM with eta 1", ["--solver", "ddim", "--eta", "1"], "even", STEPS),
    ("DPM-Solver++(2M)", ["--solver", "dpm-solver-2m"], "even", STEPS),
    ("SDE-DPM-Solver++(2M)", ["--solver", "dpm-solver-sde"], "even", STEPS),
    ("UniPC-2", ["--solver", "unipc-2"], "even", STEPS),
    ("DPM-Solver++(3M)", ["--solver", "dpm-solver-3m"], "even", STEPS),
    ("UniPC-3", ["--solver", "unipc-3"], "even", STEPS),
    ("Heun", ["--solver", "heun"], "log-snr", STEPS),
    ("EDM with churn", ["--solver", "edm"], "log-snr", STEPS),
]
DIGITS = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--examples", type=pathlib.Path, default=EXAMPLES)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {}
    # The rows for few steps first, because they are the quickest.
    cells = [(count, k) for k, (_, _, _, steps) in enumerate(SOLVERS) for count in steps]
    for count, k in sorted(cells):
        name, options, spacing, _ = SOLVERS[k]
        options = [*options, "--spacing", spacing, "--sampling-steps", str(count)]
        figures[name, count] = measure(args, f"{k}-{spacing}-{count}", options)
    columns = [*STEPS, 100]
    print("| solver | " + " | ".join(str(s) for s in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for name, _, _, steps in SOLVERS:
        cells = [f"{figures[name, s]:.1f}" if s in steps else "" for s in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")
    draw(args)


def measure(args, name, options):
    found = args.out / f"{name}.json"
    both = ["--checkpoint", args.checkpoint, *options]
    if not found.exists():
        run(args, "mnist-fd", "--data", args.data, "--classifier", args.classifier, "--count", str(args.count), *both,
            "--json", found)
    picture = args.out / f"{name}.png"
    if not picture.exists():
        run(args, "sample", "--count", str(DIGITS), "--images", args.out / name, *both, "--out", picture)
    return json.loads(found.read_text())["samples"]["mnist_fd"]


def run(args, example, *options):
    command = [args.examples / example, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr}")


def draw(args):
    """Draws a row per solver and a column per number of steps."""
    label, top, gap = 150, 16, 10
    width, height = DIGITS * 28 + gap, 28 + 6
    page = Image.new("L", (label + len(STEPS) * width, top + len(SOLVERS) * height), 255)
    pen = ImageDraw.Draw(page)
    for column, count in enumerate(STEPS):
        pen.text((label + column * width, 2), f"{count} steps", fill=0)
    for row, (name, _, spacing, _) in enumerate(SOLVERS):
        y = top + row * height
        pen.text((4, y + 8), name, fill=0)
        for column, count in enumerate(STEPS):
            images = sorted((args.out / f"{row}-{spacing}-{count}").glob("*.png"))
            for i, image in enumerate(images):
                page.paste(Image.open(image), (label + column * width + i * 28, y))
    page.save(args.out / "few-steps.png", optimize=True)


main()
