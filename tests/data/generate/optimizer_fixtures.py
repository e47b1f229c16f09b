"""Writes what torch.optim does to a few small tensors, in float32 and in float64.

    python optimizer_fixtures.py OUT.safetensors

The file's tensors and metadata are described in ../README.md.
"""
import argparse
import json

import torch
from safetensors.torch import save_file

SHAPES = [(5,), (3, 4), (2, 3, 3, 3)]
STEPS = 12
SEED = 0

DEFAULTS = {
    "optimizer": "Adam",  # or AdamW
    "lr": 0.01,
    "warmup": 0,  # step k uses lr * min(1, k / warmup)
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,  # Adam adds it to the gradient, AdamW shrinks the parameter by lr * weight_decay
    "clip_norm": None,  # of all gradients together
    "ema_decay": None,  # the average begins as a copy of the parameters
}
CASES = {
    "adam": {},
    "adam_l2": {"weight_decay": 0.1},
    "adamw": {"optimizer": "AdamW", "weight_decay": 0.1},
    "adamw_betas": {"optimizer": "AdamW", "weight_decay": 0.01, "betas": [0.8, 0.95], "eps": 1e-6},
    "adamw_clip": {"optimizer": "AdamW", "weight_decay": 0.1, "clip_norm": 1.0},
    "adam_ema": {"ema_decay": 0.9},
    "adam_warmup": {"warmup": 5},
}


def random_gradients(generator):
    """By step and parameter: scales from 1e-4 to 30, a fifth of the elements exactly 0, a fifth around 1e-10."""
    steps = []
    for step in range(1, STEPS + 1):
        grads = []
        for shape in SHAPES:
            scale = 10 ** (torch.rand((), generator=generator) * 5.5 - 4)
            grad = scale * torch.randn(shape, generator=generator)
            kind = torch.rand(shape, generator=generator)
            grad[kind < 0.4] = 1e-10 * torch.randn(shape, generator=generator)[kind < 0.4]
            grad[kind < 0.2] = 0.0
            if step == 4:  # a whole step without gradient: the norm is 0
                grad.zero_()
            if step == 7:  # a small step: the norm is below every limit
                grad.mul_(1e-3)
            grads.append(grad)
        grads[1][0, 0] = 0.0  # one element never moves, but by decay
        grads[1][0, 1] = 1e-10 * step  # one has only ever tiny gradients
        steps.append(grads)
    return steps


def run(case, params, gradients, dtype):
    """What the case's file section holds, by key."""
    params = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in params]
    # foreach=False: one tensor after another, the plainest of torch's implementations
    optimizer = getattr(torch.optim, case["optimizer"])(
        params, lr=case["lr"], betas=case["betas"], eps=case["eps"], weight_decay=case["weight_decay"], foreach=False
    )
    out = {}
    ema = [p.detach().clone() for p in params]
    for step, grads in enumerate(gradients, start=1):
        for group in optimizer.param_groups:
            group["lr"] = case["lr"] * min(1.0, step / max(case["warmup"], 1))
        for param, grad in zip(params, grads):
            param.grad = grad.to(dtype, copy=True)  # clipping writes to it
        if case["clip_norm"] is not None:
            out[f"norm.{step}"] = torch.nn.utils.clip_grad_norm_(params, case["clip_norm"], foreach=False)
        optimizer.step()
        for i, param in enumerate(params):
            out[f"after.{step}.{i}"] = param.detach().clone()
            if case["ema_decay"] is not None:
                ema[i].mul_(case["ema_decay"]).add_(param.detach(), alpha=1 - case["ema_decay"])
                out[f"ema.{step}.{i}"] = ema[i].clone()
    for i, param in enumerate(params):
        out[f"exp_avg.{i}"] = optimizer.state[param]["exp_avg"]
        out[f"exp_avg_sq.{i}"] = optimizer.state[param]["exp_avg_sq"]
    return out


def widen(key):
    """`after.3.0` to `after64.3.0`"""
    kind, rest = key.split(".", 1)
    return f"{kind}64.{rest}"


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    out = p.parse_args().out
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    params = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = random_gradients(generator)

    tensors, metadata = {}, {"cases": json.dumps(list(CASES)), "torch": torch.__version__.split("+")[0]}
    for name, changes in CASES.items():
        case = DEFAULTS | changes
        f32, f64 = (run(case, params, gradients, dtype) for dtype in (torch.float32, torch.float64))
        inputs = {f"param.{i}": p for i, p in enumerate(params)}
        inputs |= {f"grad.{s}.{i}": g for s, grads in enumerate(gradients, 1) for i, g in enumerate(grads)}
        section = inputs | f32 | {widen(key): value for key, value in f64.items()}
        # clones: save_file refuses tensors that share memory
        tensors |= {f"{name}.{key}": value.clone() for key, value in section.items()}

        errors = {}
        for key, value in f32.items():
            kind = key.split(".")[0]
            errors[kind] = max(errors.get(kind, 0.0), (value.double() - f64[key]).abs().max().item())
        metadata[name] = json.dumps(case | {"steps": STEPS, "float32_error": errors})
        print(name, {kind: f"{error:.1e}" for kind, error in errors.items()})
    save_file(tensors, out, metadata)


if __name__ == "__main__":
    main()
