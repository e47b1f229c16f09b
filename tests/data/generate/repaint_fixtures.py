"""Writes trajectories of the RePaint scheduler of diffusers, with the best denoiser of normal data and known noise.

    python repaint_fixtures.py OUT.safetensors

The file's tensors and metadata are described in ../README.md.
"""
import argparse
import json
from unittest import mock

import diffusers
import numpy
import torch
from diffusers import RePaintScheduler
from diffusers.schedulers import scheduling_repaint
from diffusers_fixtures import linear_betas, use_float64_tables
from safetensors.torch import save_file

STEPS, MEAN, STD = 1000, 0.3, 0.5
CASES = {
    "ancestral": {"eta": 1.0, "count": 10, "jump": 3, "resamplings": 3},
    "half": {"eta": 0.5, "count": 8, "jump": 1, "resamplings": 2},
}


def predicted_noise(x, alpha_bar):
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    gain = STD**2 * signal / (alpha_bar * STD**2 + 1 - alpha_bar)
    return (x - signal * (gain * x + MEAN * (1 - gain * signal))) / noise


def denoised(scheduler, x, t, z, picture, known):
    with mock.patch.object(scheduling_repaint, "randn_tensor", lambda *_, **__: z):
        out = predicted_noise(x, scheduler.alphas_cumprod[t])
        return scheduler.step(out, t, x, picture, known).prev_sample


def noised(scheduler, x, start, end, generator):
    """The sample at the later timestep `end`, and the standard normal noise that takes all forward steps at once."""
    normals = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(start, end)]
    drawn = iter(normals)
    with mock.patch.object(scheduling_repaint, "randn_tensor", lambda *_, **__: next(drawn)):
        for t in range(start, end, STEPS // scheduler.num_inference_steps):
            # The first forward step from timestep t has the beta of t + 1.
            x = scheduler.undo_step(x, t + 1)
    # Each noise reaches the end times the root of its beta and of the later alphas.
    betas, ratio = scheduler.betas[start + 1 : end + 1], scheduler.alphas_cumprod[end] / scheduler.alphas_cumprod[start]
    later = torch.cat([scheduler.alphas[start + 2 : end + 1].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=x.dtype)])
    factors = (betas * later / (1 - ratio)).sqrt()
    assert abs((factors**2).sum() - 1) < 1e-12
    return x, sum(f * normal for f, normal in zip(factors, normals))


def run(case, generator):
    shape = [2, 1, 3, 4]
    rand = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    picture = torch.rand(shape[1:], generator=generator, dtype=torch.float64) * 2 - 1
    known = (torch.rand(shape[1:], generator=generator) < 0.5).double()
    x_T = rand(shape)
    scheduler = RePaintScheduler(STEPS, beta_schedule="linear", eta=case["eta"], clip_sample=False)
    use_float64_tables(scheduler, linear_betas())
    scheduler.set_timesteps(case["count"], case["jump"], case["resamplings"])
    # These are the timesteps at which there is a sample, as in the authors' code. The pipeline of diffusers takes the
    # sample to be one step further, and thus also repeats the step from timestep 0, unlike the paper's algorithm 1.
    visited = scheduler.timesteps.tolist()
    x, t, xs, zs, times = x_T, visited[0], [], [], []
    for i, following in enumerate(visited[1:] + [-1]):
        if following < t:
            z = rand(shape)
            x, time = denoised(scheduler, x, t, z, picture, known), t
        elif i + 2 < len(visited) and visited[i + 2] > following:
            continue  # not yet at the end of the jump
        else:
            x, z = noised(scheduler, x, t, following, generator)
            time = following
        t = following
        xs, zs, times = xs + [x], zs + [z], times + [time]
    stacked = {"x": torch.stack(xs), "z": torch.stack(zs), "times": torch.tensor(times)}
    return stacked | {"x_T": x_T, "picture": picture, "filled": 1 - known}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    out = p.parse_args().out
    torch.set_num_threads(1)
    metadata = {"cases": json.dumps(CASES), "mean": str(MEAN), "std": str(STD)}
    metadata |= {m.__name__: m.__version__.split("+")[0] for m in (diffusers, torch, numpy)}
    tensors = {}
    for seed, (name, case) in enumerate(CASES.items()):
        result = run(case, torch.Generator().manual_seed(seed))
        print(name, len(result["times"]), "steps", result["times"].tolist())
        tensors |= {f"{name}.{key}": value.contiguous().clone() for key, value in result.items()}
    save_file(tensors, out, metadata)


if __name__ == "__main__":
    main()
