"""Times the same networks in PyTorch, with the options and the JSON lines of `cargo bench --bench unet`.

    python benches/peer/unet.py --model mnist --batch 32 [--precision bf16] [--channels-last] [--compile MODE] --json

Needs the packages of tests/data/generate/requirements.txt. The network `ho` is UNet2DModel of diffusers, with the
options of google/ddpm-cifar10-32 and the dropout of Ho et al. `bf16` and `f16` are autocast, `f16` with a gradient
scaler; `high` is TF32. With --device cuda, a run is ten of what is measured before the device is waited for.
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
from reference import UNet, UNetConfig, check_moves  # noqa: E402

CONFIGS = {
    "mnist": UNetConfig(28, 1, [32, 64, 128], 128, []),
    "cifar10": UNetConfig(32, 3, [128, 256, 256, 256], 128, [1], 0.02),
}
CHOICES = [*CONFIGS, "ho"]


def ho(recompute):
    # Imported here, so that the memory of other networks does not include the package.
    from diffusers import UNet2DModel
    from unet2d import CIFAR10

    class Ho(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = UNet2DModel(**CIFAR10, dropout=0.1)
            if recompute:
                self.net.enable_gradient_checkpointing()

        def forward(self, x, t):
            return self.net(x, t, return_dict=False)[0]

    return Ho()


def main():
    check_moves()  # also before --help, by which `compare` asks whether this can run
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=CHOICES, default="mnist")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iters", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["highest", "high", "bf16", "f16"], default="highest")
    parser.add_argument("--what", choices=["train_step", "forward", "sample"])
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, of `ho` only")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", choices=["default", "reduce-overhead", "max-autotune"])
    parser.add_argument("--json", action="store_true", help="as always: only there to match")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    channels, size = (1, 28) if args.model == "mnist" else (3, 32)
    net = (ho(args.recompute) if args.model == "ho" else UNet(CONFIGS[args.model])).to(args.device)
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "highest"
    x = torch.randn(args.batch, channels, size, size, device=args.device)
    eps = torch.randn_like(x)
    t = torch.arange(args.batch, device=args.device) * 37 % 1000
    if args.channels_last:
        net, x, eps = (v.to(memory_format=torch.channels_last) for v in (net, x, eps))
    run = torch.compile(net, mode=args.compile) if args.compile else net
    optimizer = torch.optim.AdamW(net.parameters(), 2e-4, weight_decay=1e-5, fused=True)
    half = {"bf16": torch.bfloat16, "f16": torch.float16}.get(args.precision)
    precision = torch.autocast(args.device, half) if half else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "f16")

    def train_step():
        with precision:
            loss = F.mse_loss(run(x, t).float(), eps)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    @torch.no_grad()
    def forward():
        with precision:
            run(x, t)

    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    @torch.no_grad()
    def sample():
        """Ten steps of DDIM."""
        image = x
        for i in range(9, -1, -1):
            now, before = alpha_bars[i * 111].item(), alpha_bars[(i - 1) * 111].item() if i else 1.0
            with precision:
                eps = run(image, torch.full_like(t, i * 111)).float()
            x_0 = ((image - (1 - now) ** 0.5 * eps) / now**0.5).clamp(-1, 1)
            eps = (image - now**0.5 * x_0) / (1 - now) ** 0.5
            image = before**0.5 * x_0 + (1 - before) ** 0.5 * eps
        return image

    for f in [train_step, forward, sample]:
        if args.what == f.__name__ or args.what is None and f is not sample:
            net.train(f is train_step)
            measure(f, args)


def measure(f, args):
    cuda = args.device == "cuda"
    warm_up, at_once = (10, 10) if cuda else (3, 1)
    for _ in range(warm_up):
        f()
    ms = []
    for _ in range(args.iters):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(at_once):
            f()
        if cuda:
            torch.cuda.synchronize()
        ms.append(1e3 * (time.perf_counter() - start) / at_once)
    ms.sort()
    print(json.dumps({
        "name": f.__name__, "model": args.model, "batch": args.batch, "precision": args.precision,
        "threads": torch.get_num_threads(), "ms_min": ms[0], "ms_median": ms[len(ms) // 2],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gpu_mb": (lambda free, total: (total - free) / 1e6)(*torch.cuda.mem_get_info()) if cuda else None,
    }), flush=True)


main()
