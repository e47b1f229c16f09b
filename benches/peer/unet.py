"""Times the same networks in PyTorch, with the options and the JSON lines of `cargo bench --bench unet`.

    python benches/peer/unet.py --model mnist --batch 32 [--precision bf16] [--channels-last] [--compile MODE]
        [--compile-step] [--adamw foreach] [--graph] [--attention KIND] [--cast-weights] --json

Needs the packages of tests/data/generate/requirements.txt. The network `ho` is UNet2DModel of diffusers, with the
options of google/ddpm-cifar10-32 and the dropout of Ho et al. `bf16` and `f16` are autocast, `f16` with a gradient
scaler; `high` is TF32. With --device cuda, a run is ten of what is measured before the device is waited for.

No single configuration of PyTorch is the fastest everywhere. --compile compiles the network, and --compile-step also
compiles clipping and AdamW. --graph captures all launches of a whole training step, or of ten steps of sampling, as one
CUDA graph. The modes reduce-overhead and max-autotune capture the passes of the network as separate graphs. The `value`
in the output shows whether two configurations compute the same: it is the loss after equally many steps on the same
images, or the mean square of the result.
"""
import argparse
import contextlib
import json
import math
import pathlib
import resource
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests/data/generate"))
from reference import Attention, UNet, UNetConfig, check_moves  # noqa: E402

CONFIGS = {
    "mnist": UNetConfig(28, 1, [32, 64, 128], 128, []),
    "cifar10": UNetConfig(32, 3, [128, 256, 256, 256], 128, [1], 0.02),
    # For tests of this program.
    "tiny": UNetConfig(8, 3, [8, 16], 8, [0]),
}
CHOICES = [*CONFIGS, "ho"]
HALF = {"bf16": torch.bfloat16, "f16": torch.float16}
COMPILE = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
ATTENTION = ["auto", "plain", "math", "flash", "efficient", "cudnn"]


def positive(text):
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return number


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CHOICES, default="mnist")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--iters", type=positive, default=10)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["highest", "high", *HALF], default="highest")
    parser.add_argument("--what", choices=["train_step", "forward", "sample"])
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, of `ho` only")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", choices=COMPILE, help="how the network is compiled; default: it is not")
    parser.add_argument("--compile-step", action="store_true", help="compiles clipping and AdamW in the same mode")
    parser.add_argument("--adamw", choices=["fused", "foreach"], default="fused", help="PyTorch's implementation")
    parser.add_argument("--graph", action="store_true", help="captures what is measured as one CUDA graph")
    parser.add_argument("--attention", choices=ATTENTION, default="auto",
                        help="plain: two products and a softmax; the others: scaled_dot_product_attention, in the "
                             "implementation named or that of PyTorch's choice")
    parser.add_argument("--cast-weights", action="store_true",
                        help="keeps the weights in half precision instead of converting them in each pass")
    parser.add_argument("--json", action="store_true", help="as always: only there to match")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if args.graph and args.device != "cuda":
        parser.error("--graph needs --device cuda")
    if args.graph and args.compile in ["reduce-overhead", "max-autotune"]:
        parser.error(f"--graph: --compile {args.compile} captures graphs of its own; use default or "
                     "max-autotune-no-cudagraphs")
    if args.graph and args.what is None:
        parser.error("--graph needs --what")
    if args.compile_step and (args.compile is None or args.what != "train_step"):
        parser.error("--compile-step needs --compile and --what train_step")
    if args.compile_step and args.adamw == "foreach" and args.precision == "f16":
        parser.error("--compile-step --adamw foreach: only the fused AdamW skips an update after an overflow on the "
                     "device, which f16 needs")
    if args.attention in ["flash", "efficient", "cudnn"] and args.device != "cuda":
        parser.error(f"--attention {args.attention} needs --device cuda")
    if args.attention == "plain" and args.model == "ho":
        parser.error("--attention plain: the network `ho` is that of diffusers, which has its own attention")
    if args.recompute and args.model != "ho":
        parser.error(f"--recompute: the network is {args.model}; it must be ho")
    if args.cast_weights and (args.precision not in HALF or args.what not in ["forward", "sample"]):
        parser.error("--cast-weights needs --precision bf16 or f16, and --what forward or sample")
    return args


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


def plain_attention(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def select_attention(kind):
    if kind == "plain":
        Attention.attend = staticmethod(plain_attention)
    elif kind != "auto":
        # For the whole process, so that compiled code cannot miss it.
        switches = {"math": torch.backends.cuda.enable_math_sdp, "flash": torch.backends.cuda.enable_flash_sdp,
                    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
                    "cudnn": torch.backends.cuda.enable_cudnn_sdp}
        for name, switch in switches.items():
            switch(name == kind)


def main():
    check_moves()  # also before --help, by which `compare` asks whether this can run
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    select_attention(args.attention)
    channels, size = (1, 28) if args.model == "mnist" else (3, 8 if args.model == "tiny" else 32)
    net = (ho(args.recompute) if args.model == "ho" else UNet(CONFIGS[args.model])).to(args.device)
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = args.precision != "highest"
        torch.set_float32_matmul_precision("highest" if args.precision == "highest" else "high")
    half = HALF.get(args.precision)
    if args.cast_weights:
        net = net.to(half)
    x = torch.randn(args.batch, channels, size, size, device=args.device)
    eps = torch.randn_like(x)
    t = torch.arange(args.batch, device=args.device) * 37 % 1000
    if args.channels_last:
        net, x, eps = (v.to(memory_format=torch.channels_last) for v in (net, x, eps))
    autocast = half and not args.cast_weights
    precision = torch.autocast(args.device, half) if autocast else contextlib.nullcontext()
    # Converts the input within the compiled code.
    cast = (lambda x: x.to(half)) if args.cast_weights else (lambda x: x)

    def compiled(f):
        return torch.compile(f, mode=args.compile) if args.compile else f

    @contextlib.contextmanager
    def new_pass():
        # The outputs of a graph of torch.compile are valid until the next pass begins.
        if args.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with precision:
            yield

    for f in [train_step_of, forward_of, sample_of]:
        name = f.__name__.removesuffix("_of")
        if args.what == name or args.what is None and f is not sample_of:
            net.train(f is train_step_of)
            measure(name, f(args, net, compiled, new_pass, cast, x, eps, t), args)


def train_step_of(args, net, compiled, new_pass, cast, x, eps, t):
    run = compiled(net)
    weights = [*net.parameters()]
    optimizer = torch.optim.AdamW(weights, 2e-4, weight_decay=1e-5, fused=args.adamw == "fused",
                                  foreach=args.adamw == "foreach", capturable=args.device == "cuda")
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "f16")

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    update = compiled(clip_and_step) if args.compile_step else None

    def train_step():
        with new_pass():
            loss = F.mse_loss(run(x, t).float(), eps)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if update is None:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            scaler.step(optimizer)
        elif scaler.is_enabled():
            # As GradScaler.step does for an optimiser that skips an update by itself.
            found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            optimizer.grad_scale, optimizer.found_inf = None, sum(found.values())
            update()
        else:
            update()
        scaler.update()
        return loss.detach()

    return train_step


def forward_of(args, net, compiled, new_pass, cast, x, eps, t):
    run = compiled(net)
    x = cast(x)

    @torch.no_grad()
    def forward():
        with new_pass():
            return run(x, t)

    return forward


def sample_of(args, net, compiled, new_pass, cast, x, eps, t):
    """Ten steps of DDIM with clipped images."""
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = [i * 111 for i in range(9, -1, -1)]
    before = [*(alpha_bars[i] for i in times[1:]), torch.ones((), dtype=torch.float64)]
    # Tensors, because a compiled function would be compiled again for each number.
    plan = [(torch.full_like(t, i), *(a.float().to(args.device) for a in (alpha_bars[i], b)))
            for i, b in zip(times, before)]

    def step(image, t, now, before):
        eps = net(cast(image), t).float()
        x_0 = ((image - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        eps = (image - now.sqrt() * x_0) / (1 - now).sqrt()
        return before.sqrt() * x_0 + (1 - before).sqrt() * eps

    run = compiled(step)

    @torch.no_grad()
    def sample():
        image = x
        for numbers in plan:
            with new_pass():
                image = run(image, *numbers)
                if args.compile:
                    image = image.clone()
        return image

    return sample


def captured(f, before):
    """One CUDA graph of `f`, after runs on a separate stream, which compile and select algorithms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(before):
            f()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = f()

    def replay():
        graph.replay()
        return result

    return replay


def measure(name, f, args):
    cuda = args.device == "cuda"
    begin = time.perf_counter()
    warm_up, at_once = (10, 10) if cuda else (3, 1)
    if args.graph:
        # Capturing runs nothing, so each configuration has run equally often when it is timed.
        warm_up, before = 5, 5
        f = captured(f, before)
    for _ in range(warm_up):
        f()
    if cuda:
        torch.cuda.synchronize()
        # Frees memory that only the selection of algorithms needed, so that it is not counted.
        torch.cuda.empty_cache()
    warm = time.perf_counter() - begin
    ms = []
    for _ in range(args.iters):
        start = time.perf_counter()
        for _ in range(at_once):
            result = f()
        if cuda:
            torch.cuda.synchronize()
        ms.append(1e3 * (time.perf_counter() - start) / at_once)
    ms.sort()
    value = (result if name == "train_step" else result.float().square().mean()).item()
    print(json.dumps({
        "name": name, "model": args.model, "batch": args.batch, "precision": args.precision, "way": way(args),
        "threads": torch.get_num_threads(), "ms_min": ms[0], "ms_median": ms[len(ms) // 2], "warm_up_s": warm,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gpu_mb": (lambda free, total: (total - free) / 1e6)(*torch.cuda.mem_get_info()) if cuda else None,
        "value": value if math.isfinite(value) else None,
    }), flush=True)


def way(args):
    """The name of the configuration of PyTorch."""
    words = [args.compile or "eager"]
    words += ["compiled step"] if args.compile_step else []
    words += ["foreach"] if args.adamw == "foreach" else []
    words += ["whole graph"] if args.graph else []
    words += [f"{args.attention} attention"] if args.attention != "auto" else []
    words += ["weights cast once"] if args.cast_weights else []
    words += [] if args.channels_last else ["contiguous"]
    return ", ".join(words)


if __name__ == "__main__":
    main()
