#!/usr/bin/env python3
"""Draws the smoothed losses of several runs over each other, and prints their means.

    docs/results/curves.py OUT.svg NAME=metrics.jsonl [NAME=metrics.jsonl ...]

A point of a curve is the mean of WINDOW steps. The table that it prints has the mean of every tenth of the steps.
"""
import json
import math
import sys

WINDOW = 50
COLOURS = ["#144e8c", "#c8501e", "#2d8a4e", "#8a2d80"]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 960, 480, 70, 50, 30


def losses(path):
    with open(path) as lines:
        return [json.loads(line)["loss"] for line in lines]


def mean(values):
    return sum(values) / len(values)


def main(out, *runs):
    runs = {name: losses(path) for name, path in (run.split("=", 1) for run in runs)}
    steps = min(map(len, runs.values()))
    curves = {
        name: [mean(run[i : i + WINDOW]) for i in range(0, steps - WINDOW + 1, WINDOW)] for name, run in runs.items()
    }
    low = min(map(min, curves.values())) / 1.1
    high = max(map(max, curves.values())) * 1.1

    def place(step, loss):
        x = LEFT + step / steps * (WIDTH - LEFT - 20)
        y = TOP + math.log(high / loss) / math.log(high / low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="15">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in (0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5):
        if low <= loss <= high:
            x, y = place(0, loss).split(",")
            svg.append(f'<path d="M{x} {y}H{WIDTH - 20}" stroke="#e0e0e0"/>')
            svg.append(f'<text x="{LEFT - 8}" y="{float(y) + 5}" text-anchor="end">{loss}</text>')
    for step in range(0, steps + 1, steps // 4):
        x = place(step, low).split(",")[0]
        svg.append(f'<text x="{x}" y="{HEIGHT - 26}" text-anchor="middle">{step}</text>')
    svg.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(place((k + 0.5) * WINDOW, loss) for k, loss in enumerate(curve))
        # Wide below and narrow above, so that curves which coincide are all seen.
        width = 1.2 + 2.4 * (len(curves) - 1 - i)
        svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width:.1f}"/>')
        svg.append(f'<path d="M{WIDTH - 280} {TOP + 22 * i + 20}h30" stroke="{colour}" stroke-width="{width:.1f}"/>')
        svg.append(f'<text x="{WIDTH - 240}" y="{TOP + 22 * i + 25}">{name}</text>')
    with open(out, "w") as file:
        file.write("\n".join([*svg, "</svg>\n"]))

    print("| steps | " + " | ".join(runs) + " |")
    print("| --- |" + " --- |" * len(runs))
    for i in range(0, steps, steps // 10):
        row = [f"{mean(run[i : i + steps // 10]):.5f}" for run in runs.values()]
        print(f"| {i + 1} to {i + steps // 10} | " + " | ".join(row) + " |")
    first = next(iter(runs))
    for name, run in list(runs.items())[1:]:
        apart = [(a - b) ** 2 for a, b in zip(runs[first][:steps], run)]
        print(f"{name}: step by step {math.sqrt(mean(apart)):.1e} from {first}, root of the mean square")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
