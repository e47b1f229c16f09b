"""Writes bits per dimension, by the variational bound and by the probability-flow ODE, computed by PyTorch in float64.

    python likelihood_fixtures.py UNET.safetensors OUT.safetensors

The file's tensors are described in ../README.md.
"""
import argparse
import json
import math

import numpy as np
import torch
from objective_fixtures import log_bin
from reference import LinearSchedule, UNet, UNetConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence

SEED, PURPOSE = 5, 17
NOISE, DEQUANTISATION, PROBE = 0, 2, 3  # uses of random numbers
STEPS = 20
SCHEDULE = LinearSchedule(STEPS, 1e-3, 0.4)
BARS = SCHEDULE.alpha_bars


def philox(counter, key):
    """Philox4x32-10. Salmon et al. 2011. `counter` is a list of four arrays of uint64."""
    mask = np.uint64(0xFFFFFFFF)
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
             p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 1)


def uniforms(use, step, image, count):
    block = np.arange(-(-count // 4), dtype=np.uint64)
    place = PURPOSE << 56 | use << 40 | step
    parts = [np.full_like(block, part) for part in (image, place & 0xFFFFFFFF, place >> 32)]
    return (philox([block, *parts], (SEED, 0)).ravel()[:count] + 0.5) / 2**32


def normals(step, image, shape):
    """Box and Muller 1958, rounded to float32."""
    u = uniforms(NOISE, step, image, math.prod(shape) + 1).astype(np.float64)
    u = u[: len(u) // 2 * 2].reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()[: math.prod(shape)]
    return torch.tensor(pairs.astype(np.float32)).double().reshape(shape)


def per_image(draw, images):
    return torch.stack([draw(k).reshape(images.shape[1:]) for k in range(len(images))])


def known(x, _t):
    """A network with a known prediction and variance."""
    return torch.tanh(0.7 * x), torch.sin(3 * x)


def bound(network, images, prediction, variance, clip):
    """Total, prior, and for each timestep: bits per dimension, squared error of x_0 and of the noise.

    Ho et al. 2020, equations 5 to 8 and 13; the variance and its value at timestep 0 are those of Nichol and
    Dhariwal 2021.
    """
    betas, alphas = SCHEDULE.betas, SCHEDULE.alphas
    before = torch.cat([torch.ones(1, dtype=torch.float64), BARS[:-1]])
    posterior = betas * (1 - before) / (1 - BARS)
    posterior = torch.cat([posterior[1:2], posterior[1:]])

    def mean_of(values):
        return values.flatten(1).mean(1)

    terms, x_0_mse, noise_mse = [], [], []
    for t in range(STEPS):
        eps = per_image(lambda k: normals(t, k, images.shape[1:]), images)
        signal, noise = BARS[t].sqrt(), (1 - BARS[t]).sqrt()
        x_t = signal * images + noise * eps
        output, v = network(x_t, torch.full((len(images),), t))
        predicted = {"epsilon": (x_t - noise * output) / signal, "sample": output,
                     "velocity": signal * x_t - noise * output}[prediction]
        predicted = predicted.clamp(-1, 1) if clip else predicted
        implied = (x_t - signal * predicted) / noise
        x_0_mse.append(mean_of((predicted - images) ** 2))
        noise_mse.append(mean_of((implied - eps) ** 2))

        def mean(x_0):
            return (before[t].sqrt() * betas[t] * x_0 + alphas[t].sqrt() * (1 - before[t]) * x_t) / (1 - BARS[t])

        # Both fixed variances have the posterior variance of timestep 1 at timestep 0.
        if variance == "learned":
            log = (v + 1) / 2 * betas.log()[t] + (1 - v) / 2 * posterior.log()[t]
        else:
            log = {"beta": torch.cat([posterior[:1], betas[1:]]), "posterior": posterior}[variance].log()[t]
        std = torch.exp(0.5 * log).expand_as(images)
        if t == 0:
            centred = images - mean(predicted)
            low, high = (centred - 1 / 255) / std, (centred + 1 / 255) / std
            log_p = torch.where(images < -0.999, torch.special.log_ndtr(high),
                                torch.where(images > 0.999, torch.special.log_ndtr(-low), log_bin(low, high)))
            term = -log_p
        else:
            term = kl_divergence(Normal(mean(images), posterior[t].sqrt()), Normal(mean(predicted), std))
        terms.append(mean_of(term) / math.log(2))
    last = Normal(BARS[-1].sqrt() * images, (1 - BARS[-1]).sqrt())
    prior = mean_of(kl_divergence(last, Normal(0.0, 1.0))) / math.log(2)
    terms, x_0_mse, noise_mse = (torch.stack(found, 1) for found in (terms, x_0_mse, noise_mse))
    return {"total": prior + terms.sum(1), "prior": prior, "terms": terms, "x_0_mse": x_0_mse, "noise_mse": noise_mse}


def log_density(network, images, probes, steps):
    """The logarithm of the density, and bits per dimension of 256 pixel values.

    Integrates the ODE of Karras et al. 2022, equation 1, with sigma(t) = t: `dy / d ln(sigma) = y - x_0(y)` for
    `y = x / sqrt(alpha_bar)`. The logarithm of sigma is linear between two timesteps.
    """
    log_sigmas = 0.5 * torch.log((1 - BARS) / BARS).numpy()
    ends = log_sigmas[0], log_sigmas[-1]
    size = images[0].numel()

    def slope(y, log_sigma):
        sigma = math.exp(log_sigma)
        signal = 1 / math.sqrt(1 + sigma**2)
        t = float(np.interp(log_sigma, log_sigmas, np.arange(STEPS)))
        y = y.detach().requires_grad_()
        x_0 = y - sigma * network(signal * y, torch.full((len(y),), t, dtype=torch.float64))[0]
        trace = torch.zeros(len(y), dtype=torch.float64)
        for probe in probes:
            (gradient,) = torch.autograd.grad((x_0 * probe).sum(), y, retain_graph=True)
            trace += (gradient * probe).flatten(1).sum(1) / len(probes)
        return (y - x_0).detach(), size - trace

    def signal(log_sigma):
        return -0.5 * math.log1p(math.exp(2 * log_sigma))

    y, integral, h = images / math.exp(signal(ends[0])), 0, (ends[1] - ends[0]) / steps
    for i in range(steps):
        s = ends[0] + i * h
        a = slope(y, s)
        b = slope(y + h / 2 * a[0], s + h / 2)
        c = slope(y + h / 2 * b[0], s + h / 2)
        d = slope(y + h * c[0], min(s + h, ends[1]))
        change = [h / 6 * (a[k] + 2 * b[k] + 2 * c[k] + d[k]) for k in range(2)]
        y, integral = y + change[0], integral + change[1]
    end = Normal(0.0, 1.0).log_prob(math.exp(signal(ends[1])) * y).flatten(1).sum(1)
    found = end + integral + size * (signal(ends[1]) - signal(ends[0]))
    return found, (-found / size - math.log(2 / 255)) / math.log(2)


def likelihood(network, images, steps=300):
    """By two vectors of random signs, with uniform dequantisation."""
    size = images[0].numel()

    def signs(number):
        draw = lambda k: torch.tensor(np.where(uniforms(PROBE, number, k, size) < 0.5, -1.0, 1.0))
        return per_image(draw, images)

    offsets = per_image(lambda k: torch.tensor((2 * uniforms(DEQUANTISATION, 0, k, size) - 1).astype(np.float32)), images)
    found, bits = log_density(network, images + offsets.double() / 255, [signs(0), signs(1)], steps)
    return {"log_density": found, "bits": bits}


def unet(path):
    with safe_open(path, "pt") as file:
        config = UNetConfig(**json.loads(file.metadata()["config"]))
        names = [name for name in file.keys() if name.startswith("weights.")]
        weights = {name.removeprefix("weights."): file.get_tensor(name) for name in names}
    network = UNet(config)
    network.load_state_dict(weights)
    network.double()
    return (lambda x, t: (network(x, t), None)), (2, config.channels, config.image_size, config.image_size)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("unet")
    parser.add_argument("out")
    a = parser.parse_args()
    torch.set_num_threads(1)
    network, shape = unet(a.unet)
    generator = torch.Generator().manual_seed(3)

    def images(*shape):
        pixels = torch.randint(0, 256, shape, generator=generator).double()
        pixels.view(-1)[:2] = torch.tensor([0.0, 255.0])
        return pixels / 127.5 - 1

    tensors = {"betas": SCHEDULE.betas, "known.images": images(2, 1, 2, 3), "unet.images": images(*shape)}
    for prediction in ["epsilon", "sample", "velocity"]:
        for variance in ["beta", "posterior", "learned"]:
            for clip in [False, True]:
                found = bound(known, tensors["known.images"], prediction, variance, clip)
                name = f"known.{prediction}.{variance}.{'clipped' if clip else 'plain'}"
                tensors |= {f"{name}.{key}": value for key, value in found.items()}
    with torch.no_grad():
        found = bound(network, tensors["unet.images"], "epsilon", "posterior", True)
    tensors |= {f"unet.{key}": value for key, value in found.items()}
    flow = likelihood(network, tensors["unet.images"])
    coarse = likelihood(network, tensors["unet.images"], 150)
    print("bits of 300 and 150 steps:", flow["bits"].tolist(), coarse["bits"].tolist())
    tensors |= {f"unet.flow.{key}": value for key, value in flow.items()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, a.out)


if __name__ == "__main__":
    main()
