"""Writes features of two sets of images, and the metrics that torch-fidelity, pytorch-fid, prdc and NumPy compute from
them in float64.

    python metrics.py OUT_DIR --features random --count 150 130 --size 12
    python metrics.py OUT_DIR --features digits --count 150 150 --size 24
    python metrics.py OUT_DIR --features random --count 14 20 --size 24 --subset-size 9

A directory holds metrics.safetensors and statistics files of the second set. Random numbers of the crate are computed
again by the generator that its documentation states, Philox4x32-10.
"""
import argparse
import json
import math
import os

import numpy as np
import prdc
import pytorch_fid.fid_score as pytorch_fid
import scipy.stats
import sklearn.datasets
import torch
import torch_fidelity
from safetensors.torch import save_file
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("--features", choices=["random", "digits"], required=True)
parser.add_argument("--count", type=int, nargs=2, required=True)
parser.add_argument("--size", type=int, required=True)
parser.add_argument("--classes", type=int, default=10)
parser.add_argument("--subsets", type=int, default=4)
parser.add_argument("--subset-size", type=int, default=50)
parser.add_argument("--splits", type=int, default=3)
parser.add_argument("--k", type=int, default=3)
parser.add_argument("--directions", type=int, default=70)
parser.add_argument("--seed", type=int, default=7)
args = parser.parse_args()
(m, n), d = args.count, args.size

SUBSET, DIRECTION = 15, 16


class Stream:
    """The crate's random numbers of a purpose, a step and a sample."""

    def __init__(self, purpose, step, sample):
        place = purpose << 56 | step
        self.key = [args.seed & 0xFFFFFFFF, args.seed >> 32]
        self.counter = [0, sample, place & 0xFFFFFFFF, place >> 32]
        self.block = []

    def u32(self):
        if not self.block:
            c, k = list(self.counter), list(self.key)
            for _ in range(10):
                p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
                c = [q >> 32 ^ c[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
                k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
            self.counter[0] += 1
            self.block = c
        return self.block.pop(0)

    def below(self, bound):
        while True:
            product = self.u32() * bound
            if product & 0xFFFFFFFF >= 2**32 % bound:
                return product >> 32

    def permutation(self, count):
        order = list(range(count))
        for i in range(count - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order

    def normals(self, count):
        values = []
        while len(values) < count:
            radius = math.sqrt(-2 * math.log((self.u32() + 0.5) / 2**32))
            angle = math.tau * ((self.u32() + 0.5) / 2**32)
            values += [np.float32(radius * math.cos(angle)), np.float32(radius * math.sin(angle))]
        return np.array(values[:count], np.float64)


random = np.random.default_rng(args.seed)
if args.features == "digits":
    # The handwritten digits of scikit-learn, 8 x 8 pixels; the features of a random layer.
    digits, labels = sklearn.datasets.load_digits(return_X_y=True)
    layer = random.normal(size=(64, d)) / 40
    order = random.permutation(len(digits))[: m + n]
    features = np.maximum(digits[order] @ layer, 0).astype(np.float32)
    first, second = features[:m], features[m:]
else:
    mix = random.normal(size=(d, d)) / math.sqrt(d)
    first = (random.normal(size=(m, d)) @ mix).astype(np.float32)
    second = (random.normal(size=(n, d)) @ mix * 1.2 + 0.3).astype(np.float32)
logits = (random.normal(size=(n, args.classes)) * 2).astype(np.float32)
x, y = first.astype(np.float64), second.astype(np.float64)
tx, ty, tl = torch.tensor(x), torch.tensor(y), torch.tensor(logits)
expected = {}

# Fréchet. The singular values of the centred points need no covariance, and are exact for fewer images than features.
statistics = [(points.mean(0), np.cov(points, rowvar=False)) for points in (x, y)]
(mu_1, sigma_1), (mu_2, sigma_2) = statistics
centred = [(p - p.mean(0)) / math.sqrt(len(p) - 1) for p in (x, y)]
shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
expected["frechet"] = float(((mu_1 - mu_2) ** 2).sum() + np.trace(sigma_1) + np.trace(sigma_2) - 2 * shared)
of = [metric_fid.fid_features_to_statistics(t) for t in (tx, ty)]
expected["frechet_torch_fidelity"] = metric_fid.fid_statistics_to_metric(*of, False)[metric_fid.KEY_METRIC_FID]
if min(m, n) > d:
    expected["frechet_pytorch_fid"] = float(pytorch_fid.calculate_frechet_distance(mu_1, sigma_1, mu_2, sigma_2))

# KID: torch-fidelity's estimate for the crate's subsets.
subsets = [
    [np.array(Stream(SUBSET, s, of).permutation(count)[: args.subset_size]) for of, count in enumerate((m, n))]
    for s in range(args.subsets)
]
kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
estimates = [metric_kid.kernel_mmd(x[i], y[j], **kernel) for i, j in subsets]
expected["kernel_mean"], expected["kernel_deviation"] = float(np.mean(estimates)), float(np.std(estimates))
if m == n:
    expected["kernel_mmd2"] = float(metric_kid.kernel_mmd(x, y, **kernel))

# Inception Score, of the images in their order.
score = metric_isc.isc_features_to_metric(tl, args.splits, shuffle=False)
expected["inception_mean"] = score[metric_isc.KEY_METRIC_ISC_MEAN]
expected["inception_deviation"] = score[metric_isc.KEY_METRIC_ISC_STD]

# Precision and recall by both programs, density and coverage by prdc. The first set is the real one.
expected |= {name: float(value) for name, value in prdc.compute_prdc(x, y, args.k).items()}
pair = metric_prc.calculate_precision_recall_full(ty, tx, args.k)
# torch-fidelity's means are float32.
assert np.allclose(pair, (expected["precision"], expected["recall"]), atol=1e-6), (pair, expected)

# MIND: the formula of torch-fidelity's main branch, which computes in float32, in float64 with the crate's directions.
# Sets of different sizes: each image as often as makes the sizes equal, which changes no quantile function.
directions = np.array([Stream(DIRECTION, 0, i).normals(d) for i in range(args.directions)])
directions /= np.linalg.norm(directions, axis=1, keepdims=True)
whole = math.lcm(m, n)
sorted_x, sorted_y = (np.sort(np.repeat(p, whole // len(p), 0) @ directions.T, axis=0) for p in (x, y))
expected["sliced"] = float(3 * d * ((sorted_x - sorted_y) ** 2).mean())

# Nearest images of the first set for each image of the second.
distances = np.sqrt(((y[:, None] - x[None]) ** 2).sum(-1))
nearest = np.argsort(distances, axis=1, kind="stable")[:, : args.k]

# Classes.
counts = np.bincount(logits.argmax(1), minlength=args.classes)
shares = np.arange(1, args.classes + 1) / np.arange(1, args.classes + 1).sum()
expected["total_variation"] = float(np.abs(counts / n - shares).sum() / 2)
expected["divergence"] = float(scipy.stats.entropy(counts, shares))

os.makedirs(args.out, exist_ok=True)
path = lambda name: os.path.join(args.out, name)
tensors = {
    "first": torch.tensor(first), "second": torch.tensor(second), "logits": tl,
    "nearest": torch.tensor(nearest.copy()),
    "distances": torch.tensor(np.take_along_axis(distances, nearest, 1)),
    "counts": torch.tensor(counts), "shares": torch.tensor(shares),
    "mean": torch.tensor(mu_2), "covariance": torch.tensor(sigma_2),
}
versions = {name: module.__version__ for name, module in
            [("numpy", np), ("scipy", scipy), ("sklearn", sklearn), ("torch", torch), ("torch-fidelity", torch_fidelity)]}
settings = {name: getattr(args, name) for name in
            ["subsets", "subset_size", "splits", "k", "directions", "seed"]}
metadata = {"expected": expected, "settings": settings, "versions": versions}
save_file(tensors, path("metrics.safetensors"), {name: json.dumps(value) for name, value in metadata.items()})
# As pytorch-fid writes them; and as the files of guided-diffusion, with images and with float32.
np.savez_compressed(path("deflated.npz"), mu=mu_2, sigma=sigma_2)
np.savez(path("stored.npz"), arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=mu_2, sigma=sigma_2,
         mu_s=mu_2.astype(np.float32), sigma_s=sigma_2.astype(np.float32))
print(json.dumps(expected, indent=1))
