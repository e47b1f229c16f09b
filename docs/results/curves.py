#!/usr/bin/env python3
"""Draws the smoothed losses of several runs over each other, and prints their means.

    docs/results/curves.py OUT.svg NAME=metrics.jsonl [NAME=metrics.jsonl ...]

A point of a curve is the mean of WINDOW steps, or one line of a log that has fewer. The table that it prints has the
mean of every tenth of the steps. Steps are those that the lines tell, as many as the shortest run has.
"""
import json
import math
import os
import sys
from xml.sax.saxutils import escape

WINDOW = 50
COLOURS = ["#144e8c", "#c8501e", "#2d8a4e", "#8a2d80"]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 960, 480, 70, 50, 30


def losses(path):
    """The loss of each step that was logged. Lines that are not whole, and losses that are no numbers, are left out."""
    found = {}
    with open(path, errors="replace") as lines:
        for line in lines:
            try:
                logged = json.loads(line)
                step, loss = int(logged["step"]), float(logged["loss"])
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            # What no logarithm takes has no place either.
            if step > 0 and math.isfinite(loss) and loss > 0:
                found[step] = loss
    if not found:
        sys.exit(f"{path}: no line has a step and a loss")
    return dict(sorted(found.items()))


def write(path, text):
    """Writes beside the target and renames, so that a file is there whole or not at all."""
    partial = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    try:
        with open(partial, "w") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        if os.path.exists(partial):
            os.unlink(partial)
        sys.exit(f"{path}: {error.strerror}")


def mean(values):
    return sum(values) / len(values)


def means(run, bounds):
    """For each pair of bounds the mean of the losses after the first, up to the second; None where there is none."""
    parts = ([loss for step, loss in run.items() if first < step <= last] for first, last in bounds)
    return [mean(part) if part else None for part in parts]


def main(out, *runs):
    for run in runs:
        if "=" not in run:
            sys.exit(f"{run}: not NAME=metrics.jsonl")
    try:
        runs = {name: losses(path) for name, path in (run.split("=", 1) for run in runs)}
    except OSError as error:
        sys.exit(str(error))
    steps = min(map(max, runs.values()))
    window = WINDOW if steps >= WINDOW else 1
    windows = [(i, i + window) for i in range(0, steps - window + 1, window)]
    # Of a log with a line every few windows, most have no point.
    curves = {
        name: [((i + 0.5) * window, loss) for i, loss in enumerate(means(run, windows)) if loss is not None]
        for name, run in runs.items()
    }
    drawn = [loss for curve in curves.values() for _, loss in curve]
    if not drawn:
        sys.exit("no line is of the steps that all runs have")
    low = min(drawn) / 1.1
    high = max(drawn) * 1.1

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
    for step in range(0, steps + 1, max(1, steps // 4)):
        x = place(step, low).split(",")[0]
        svg.append(f'<text x="{x}" y="{HEIGHT - 26}" text-anchor="middle">{step}</text>')
    svg.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(place(step, loss) for step, loss in curve)
        # Wide below and narrow above, so that curves which coincide are all seen.
        width = 1.2 + 2.4 * (len(curves) - 1 - i)
        svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width:.1f}"/>')
        svg.append(f'<path d="M{WIDTH - 280} {TOP + 22 * i + 20}h30" stroke="{colour}" stroke-width="{width:.1f}"/>')
        svg.append(f'<text x="{WIDTH - 240}" y="{TOP + 22 * i + 25}">{escape(name)}</text>')
    write(out, "\n".join([*svg, "</svg>\n"]))

    print("| steps | " + " | ".join(runs) + " |")
    print("| --- |" + " --- |" * len(runs))
    tenth = max(1, steps // 10)
    tenths = [(i, min(i + tenth, steps)) for i in range(0, steps, tenth)]
    for (before, last), row in zip(tenths, zip(*(means(run, tenths) for run in runs.values()))):
        if any(row):
            row = ["" if loss is None else f"{loss:.5f}" for loss in row]
            print(f"| {before + 1} to {last} | " + " | ".join(row) + " |")
    first = next(iter(runs))
    common = {name: {step: loss for step, loss in run.items() if step <= steps} for name, run in runs.items()}
    for name, run in list(common.items())[1:]:
        # A line is the mean of the steps since the one before: others cannot be compared.
        if run.keys() == common[first].keys():
            apart = [(common[first][step] - loss) ** 2 for step, loss in run.items()]
            print(f"{name}: step by step {math.sqrt(mean(apart)):.1e} from {first}, root of the mean square")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
