"""Times the same networks in PyTorch, with the options and the JSON lines of `cargo bench --bench unet`.

    python benches/peer/unet.py --model mnist --batch 32 [--precision bf16] [--channels-last] [--compile] --json

Needs the packages of tests/data/generate/requirements.txt. `bf16` is autocast.
"""
import argparse
import contextlib
import json
import pathlib
import resource
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests/data/generate"))
from reference import UNet, UNetConfig  # noqa: E402

CONFIGS = {
    "mnist": UNetConfig(28, 1, [32, 64, 128], 128, []),
    "cifar10": UNetConfig(32, 3, [128, 256, 256, 256], 128, [1], 0.02),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=CONFIGS, default="mnist")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", choices=["highest", "bf16"], default="highest")
    parser.add_argument("--what", choices=["train_step", "forward"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true", help="as always: only there to match")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = CONFIGS[args.model]
    net = UNet(config)
    x = torch.randn(args.batch, config.channels, config.image_size, config.image_size)
    eps = torch.randn_like(x)
    t = torch.arange(args.batch) * 37 % 1000
    if args.channels_last:
        net, x, eps = (v.to(memory_format=torch.channels_last) for v in (net, x, eps))
    run = torch.compile(net) if args.compile else net
    optimizer = torch.optim.AdamW(net.parameters(), 2e-4, weight_decay=1e-5, fused=True)
    half = torch.autocast("cpu", torch.bfloat16)
    precision = half if args.precision == "bf16" else contextlib.nullcontext()

    def train_step():
        with precision:
            loss = F.mse_loss(run(x, t).float(), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def forward():
        with precision:
            run(x, t)

    for f in [train_step, forward]:
        if args.what in (None, f.__name__):
            net.train(f is train_step)
            measure(f, args)


def measure(f, args):
    for _ in range(3):
        f()
    ms = []
    for _ in range(args.iters):
        start = time.perf_counter()
        f()
        ms.append(1e3 * (time.perf_counter() - start))
    ms.sort()
    print(json.dumps({
        "name": f.__name__, "model": args.model, "batch": args.batch, "precision": args.precision,
        "threads": torch.get_num_threads(), "ms_min": ms[0], "ms_median": ms[len(ms) // 2],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }), flush=True)


main()
