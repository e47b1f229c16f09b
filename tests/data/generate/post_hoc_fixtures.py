"""Writes the factors of post-hoc averages (Karras et al. 2024, EDM2, appendix C), computed by NumPy in float64.

    python post_hoc_fixtures.py OUT.json
"""
import json
import sys

import numpy as np


def exponent(sigma):
    # sigma^2 = (g + 1) / ((g + 2)^2 (g + 3)), a cubic equation for g.
    t = sigma**-2.0
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def dot(t_a, a, t_b, b):
    ratio = t_a / t_b
    power = np.where(t_a < t_b, b, -a)
    return (a + 1) * (b + 1) * ratio**power / ((a + b + 1) * np.maximum(t_a, t_b))


cases = []
for ends, sigmas, end, wanted in [
    ([1000.0, 1000.0], [0.05, 0.1], 1000.0, 0.075),
    ([256.0, 256.0, 512.0, 512.0], [0.05, 0.1] * 2, 512.0, 0.03),
    ([64.0, 64.0, 128.0, 128.0, 192.0, 192.0], [0.05, 0.1] * 3, 192.0, 0.15),
    ([64.0, 128.0, 192.0, 256.0], [0.1] * 4, 256.0, 0.2),
]:
    t, g = np.array(ends), np.array([exponent(s) for s in sigmas])
    matrix = dot(t[:, None], g[:, None], t[None], g[None])
    factors = np.linalg.solve(matrix, dot(t, g, end, exponent(wanted)))
    cases.append(
        {
            "ends": ends, "sigma_rel": sigmas, "end": end, "wanted": wanted, "exponents": g.tolist(),
            "factors": factors.tolist(), "condition": float(np.linalg.cond(matrix)),
        }
    )
with open(sys.argv[1], "w") as file:
    json.dump({"numpy": np.__version__, "cases": cases}, file, indent=1)
    file.write("\n")
