"""Writes the probabilities of timesteps with importance sampling (Nichol and Dhariwal 2021, section 3.3), computed by
NumPy in float64.

    python importance_fixtures.py OUT.json
"""
import json
import sys

import numpy as np

TIMESTEPS, HISTORY, UNIFORM, BATCH, UPDATES = 5, 10, 0.001, 7, 24

random = np.random.default_rng(0)
losses = [[] for _ in range(TIMESTEPS)]
updates = []
for _ in range(UPDATES):
    batch = []
    for t in random.integers(0, TIMESTEPS, BATCH).tolist():
        # A float32 number, as the losses of a run are.
        loss = float(np.float32((1 + t) * random.exponential()))
        batch.append([t, loss])
        losses[t] = (losses[t] + [loss])[-HISTORY:]
    p = None
    if all(len(of_t) == HISTORY for of_t in losses):
        root = np.sqrt(np.mean(np.array(losses) ** 2, axis=1))
        p = ((1 - UNIFORM) * root / root.sum() + UNIFORM / TIMESTEPS).tolist()
    updates.append({"losses": batch, "probabilities": p})
with open(sys.argv[1], "w") as file:
    json.dump({"numpy": np.__version__, "timesteps": TIMESTEPS, "updates": updates}, file)
    file.write("\n")
