"""Writes losses, their gradients, and samples with a learned variance, as torch and diffusers compute them.

    python objective_fixtures.py OUT.safetensors

The file's tensors are described in ../README.md.
"""
import argparse
import math
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence

STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
BARS = torch.cumprod(1 - BETAS, 0)
T = torch.tensor([0, 0, 1, 10, 400, 999])


def column(x):
    return x.reshape(-1, 1, 1, 1)


def inputs():
    generator = torch.Generator().manual_seed(1)

    def normal():
        return torch.randn(len(T), 2, 3, 2, generator=generator, dtype=torch.float64)

    x_0 = torch.tanh(normal())
    x_0[0, 0, 0] = torch.tensor([-1.0, 1.0])
    return {"x_0": x_0, "eps": normal(), "noise_output": normal(), "variance": normal()}


def weights(snr, kind, prediction):
    """Of the squared error of each prediction, as the papers and the training scripts of diffusers state them."""
    sigma2, data2 = 1 / snr, 0.5**2
    per_x_0 = {"epsilon": snr, "sample": torch.ones_like(snr), "velocity": snr + 1}[prediction]
    if kind == "uniform":
        return torch.ones_like(snr)
    if kind == "min_snr":
        return torch.clamp(snr, max=5.0) / per_x_0
    if kind == "p2":
        return snr / per_x_0 / (1 + snr) ** 0.5
    return (sigma2 + data2) / (sigma2 * data2) / per_x_0


LOSSES = {
    "mse": lambda a, b: F.mse_loss(a, b, reduction="none"),
    "l1": lambda a, b: F.l1_loss(a, b, reduction="none"),
    "huber": lambda a, b: F.huber_loss(a, b, reduction="none", delta=0.3),
}
OBJECTIVES = [("mse", "uniform"), ("mse", "min_snr"), ("mse", "p2"), ("mse", "edm"), ("l1", "uniform"),
              ("huber", "uniform"), ("huber", "min_snr")]


def log_bin(low, high):
    """The logarithm of the probability between two values of a standard normal."""
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log1p(-torch.exp(log_low - log_high))


def bound(x_0, x_t, predicted, v):
    """The terms of the variational bound in bits per value. Nichol and Dhariwal 2021, equations 4 to 6 and 15."""
    bar, before = BARS[T], torch.where(T > 0, BARS[T - 1], torch.ones(()))
    beta = BETAS[T]
    posterior = beta * (1 - before) / (1 - bar)
    second = BETAS[1] * (1 - BARS[0]) / (1 - BARS[1])
    posterior = torch.where(T > 0, posterior, second)
    bar, before, beta, posterior = map(column, (bar, before, beta, posterior))

    def mean(x_0):
        return before.sqrt() * beta / (1 - bar) * x_0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t

    share = (v + 1) / 2
    std = torch.exp(0.5 * (share * beta.log() + (1 - share) * posterior.log()))
    kl = kl_divergence(Normal(mean(x_0), posterior.sqrt()), Normal(mean(predicted).detach(), std))
    centred = x_0 - mean(predicted).detach()
    low, high = (centred - 1 / 255) / std, (centred + 1 / 255) / std
    inner = log_bin(low, high)
    log_p = torch.where(x_0 < -0.999, torch.special.log_ndtr(high),
                        torch.where(x_0 > 0.999, torch.special.log_ndtr(-low), inner))
    term = torch.where(column(T) > 0, kl, -log_p)
    return term.flatten(1).mean(1) / math.log(2)


def losses():
    tensors = inputs()
    x_0, eps = tensors["x_0"], tensors["eps"]
    snr = BARS[T] / (1 - BARS[T])
    # That of diffusers' training scripts, which is in f32.
    torch.testing.assert_close(compute_snr(SimpleNamespace(alphas_cumprod=BARS), T).double(), snr, rtol=1e-6, atol=0)
    signal, noise = column(BARS[T].sqrt()), column((1 - BARS[T]).sqrt())
    x_t = signal * x_0 + noise * eps
    targets = {"epsilon": eps, "sample": x_0, "velocity": signal * eps - noise * x_0}
    for prediction, target in targets.items():
        output = (target + 0.5 * tensors["noise_output"]).requires_grad_()
        tensors[f"{prediction}.output"] = output.detach()
        for loss, kind in OBJECTIVES:
            value = (LOSSES[loss](output, target) * column(weights(snr, kind, prediction))).mean()
            tensors[f"{prediction}.{loss}.{kind}.loss"] = value.detach()
            tensors[f"{prediction}.{loss}.{kind}.gradient"] = torch.autograd.grad(value, output)[0]
        predicted = {"epsilon": (x_t - noise * output) / signal, "sample": output,
                     "velocity": signal * x_t - noise * output}[prediction]
        v = tensors["variance"].clone().requires_grad_()
        value = STEPS * bound(x_0, x_t, predicted, v).mean()
        tensors[f"{prediction}.bound.loss"] = value.detach()
        tensors[f"{prediction}.bound.gradient"] = torch.autograd.grad(value, v)[0]
    return tensors


def samples():
    """Ancestral sampling of diffusers with a network that also outputs the variance."""
    generator = torch.Generator().manual_seed(2)
    timesteps = [999, 600, 300, 20, 0]
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = BETAS, 1 - BETAS, BARS
    scheduler.set_timesteps(timesteps=timesteps)
    x = torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64)
    tensors = {"samples.start": x}
    for t in timesteps:
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        tensors[f"samples.z.{t}"] = z
        output = torch.cat([torch.tanh(0.7 * x), torch.sin(3 * x)], 1)
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=z):
            x = scheduler.step(output, t, x).prev_sample
    tensors["samples.image"] = x
    return tensors


def sigmoid():
    """Jabri et al. 2022, algorithm 4, with betas of at most 0.999."""
    tensors = {}
    for start, end, tau in [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7)]:
        time = torch.arange(101, dtype=torch.float64) / 100
        first, last = torch.sigmoid(torch.tensor([start / tau, end / tau], dtype=torch.float64))
        gamma = (last - torch.sigmoid((time * (end - start) + start) / tau)) / (last - first)
        betas = torch.clamp(1 - gamma[1:] / gamma[:-1], max=0.999)
        tensors[f"sigmoid.{tau}"] = torch.cumprod(1 - betas, 0)
    return tensors


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    tensors = losses() | samples() | sigmoid()
    save_file({name: x.contiguous() for name, x in tensors.items()}, parser.parse_args().out)
