"""Writes what the few-step samplers of diffusers do with the best denoiser of a known mixture of normals.

    python solver_fixtures.py DIR/NAME.safetensors --schedule linear --steps 20 --seed 0

What diffusers does not have is derived here from the papers. The file's tensors and metadata are described in
../README.md.
"""
import argparse
import json
import math
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete
from diffusers.schedulers import scheduling_euler_discrete
from diffusers_fixtures import schedules
from safetensors.torch import save_file

CHURN = {"amount": 8.0, "min": 0.1, "max": 40.0, "noise": 1.003}
THRESHOLD = {"ratio": 0.8, "max": 1.3}
SOLVERS = {
    "euler": {"ddim": {"eta": 0.0}},
    "euler_ancestral": {"ddim": {"eta": 1.0}},
    "heun": "heun",
    "edm": {"edm": CHURN},
    "dpm_2m": {"dpm_solver": {"order": 2}},
    "dpm_3m": {"dpm_solver": {"order": 3}},
    "dpm_sde": "dpm_solver_sde",
} | {f"unipc_{order}_{b}": {"unipc": {"order": order, "b": b}} for order in (1, 2, 3) for b in ("bh1", "bh2")}


class Float64Torch:
    """torch, in which float32 is float64: some schedulers cast samples to float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


class Mixture:
    """Data whose pixels are independent, each from a mixture of normals."""

    def __init__(self, generator):
        rand = lambda low, high: torch.rand(3, generator=generator, dtype=torch.float64) * (high - low) + low
        self.weights, self.means, self.stds = rand(0.5, 1.5), rand(-1.4, 1.4), rand(0.15, 0.6)
        self.weights /= self.weights.sum()

    def denoised(self, y, sigma):
        """The posterior mean of the pixel of which y = x_0 + sigma noise is known."""
        variance = self.stds**2 + sigma**2
        distance = y.unsqueeze(-1) - self.means
        shares = (self.weights.log() - 0.5 * variance.log() - 0.5 * distance**2 / variance).softmax(-1)
        return (shares * (self.means + self.stds**2 / variance * distance)).sum(-1)


def sigma_of(alpha_bars):
    return ((1 - alpha_bars) / alpha_bars).sqrt()


class Process:
    def __init__(self, betas, mixture):
        self.betas, self.mixture = betas, mixture
        self.alpha_bars = (1 - betas).cumprod(0)
        self.table = sigma_of(self.alpha_bars)

    def sigmas(self, times):
        """Between two timesteps, log sigma is linear in time."""
        logs = np.interp(times, np.arange(len(self.table)), self.table.log().numpy())
        return torch.from_numpy(np.exp(logs))

    def noise(self, x, sigma):
        """The prediction of noise, for x = (x_0 + sigma noise) / sqrt(1 + sigma^2)."""
        y = x * (1 + sigma**2).sqrt()
        return (y - self.mixture.denoised(y, sigma)) / sigma


def spacings(process, steps, rho):
    """The times of each spacing, increasing."""
    total = len(process.betas)
    options = {"num_train_timesteps": total, "trained_betas": process.betas.tolist()}
    found = {"even": np.linspace(0, total - 1, steps).round()[::-1] if steps > 1 else np.array([total - 1.0])}
    for name in ("leading", "trailing"):
        scheduler = EulerDiscreteScheduler(timestep_spacing=name, **options)
        scheduler.set_timesteps(steps)
        found[name] = scheduler.timesteps.double().numpy()
    quadratic = []
    for i in range(steps):
        square = i * i * (total - 1) // max(steps - 1, 1) ** 2 if steps > 1 else total - 1
        quadratic.append(max(square, quadratic[-1] + 1 if quadratic else 0))
    found["quadratic"] = np.array(quadratic[::-1], dtype=np.float64)
    scheduler = EulerDiscreteScheduler(**options)
    table, logs = process.table.numpy(), process.table.log().numpy()
    ends = table[::-1]
    sigmas = {"log_snr": scheduler._convert_to_exponential(ends, steps)}
    if rho == 7:
        sigmas["karras"] = scheduler._convert_to_karras(ends, steps)
    else:  # Karras et al. 2022, equation 5; diffusers has only rho = 7.
        ramp = np.linspace(0, 1, steps)
        sigmas["karras"] = (ends[0] ** (1 / rho) + ramp * (ends[-1] ** (1 / rho) - ends[0] ** (1 / rho))) ** rho
    for name, values in sigmas.items():
        found[name] = np.array([scheduler._sigma_to_t(sigma, logs) for sigma in values])
    names = {"karras": {"karras": {"rho": rho}}}
    return {name: (names.get(name, name), times[::-1].copy()) for name, times in found.items()}


def drive(scheduler, process, times, x, step, scaled):
    """Runs a scheduler of diffusers with float64 tables. `scaled`: its samples are x / sqrt(alpha_bar)."""
    sigmas = torch.cat([process.sigmas(times[::-1]), torch.zeros(1, dtype=torch.float64)])
    scheduler.set_timesteps(len(times))
    scheduler.set_begin_index(0)
    repeat = isinstance(scheduler, HeunDiscreteScheduler)
    steps = torch.from_numpy(times[::-1].copy())
    scheduler.sigmas, scheduler.timesteps = sigmas, steps
    if repeat:
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        scheduler.timesteps = torch.cat([steps[:1], steps[1:].repeat_interleave(2)])
    xs = []
    factor = lambda sigma: (1 + sigma**2).sqrt() if scaled else torch.ones((), dtype=torch.float64)
    sample = x * factor(sigmas[0])
    for k, t in enumerate(scheduler.timesteps):
        i = (k + 1) // 2 if repeat else k
        network_input = scheduler.scale_model_input(sample, t)
        sample = step(process.noise(network_input, sigmas[i]), t, sample, i)
        if not repeat or k % 2 == 1 or k + 1 == len(scheduler.timesteps):
            xs.append(sample / factor(sigmas[len(xs) + 1]))
    assert len(xs) == len(times) and sample.dtype == torch.float64
    return torch.stack(xs)


def of_diffusers(name, process, times, x, z, threshold):
    options = {"num_train_timesteps": len(process.betas), "trained_betas": process.betas.tolist()}
    fixed = lambda scheduler: lambda out, t, sample, i: scheduler.step(out, t, sample).prev_sample
    if name in ("euler", "euler_ancestral", "heun"):
        kinds = {"euler": EulerDiscreteScheduler, "euler_ancestral": EulerAncestralDiscreteScheduler}
        scheduler = kinds.get(name, HeunDiscreteScheduler)(**options)
        ancestral = scheduling_euler_ancestral_discrete

        def step(out, t, sample, i):
            with mock.patch.object(ancestral, "randn_tensor", lambda *_, **__: z[i]):
                return scheduler.step(out, t, sample).prev_sample

        with mock.patch.object(ancestral, "torch", Float64Torch()):
            with mock.patch.object(scheduling_euler_discrete, "torch", Float64Torch()):
                return drive(scheduler, process, times, x, step, True)
    if threshold:
        options |= {"thresholding": True, "dynamic_thresholding_ratio": threshold["ratio"]}
        options |= {"sample_max_value": threshold["max"]}
    if name.startswith("unipc"):
        _, order, b = name.split("_")
        scheduler = UniPCMultistepScheduler(solver_order=int(order), solver_type=b, **options)
        return drive_unipc(scheduler, process, times, x)
    kind = {"dpm_2m": ("dpmsolver++", 2), "dpm_3m": ("dpmsolver++", 3)}
    algorithm, order = kind.get(name, ("sde-dpmsolver++", 2))
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=order, final_sigmas_type="zero", **options
    )
    step = lambda out, t, sample, i: scheduler.step(out, t, sample, variance_noise=z[i]).prev_sample
    with mock.patch.object(scheduling_dpmsolver_multistep, "torch", Float64Torch()):
        return drive(scheduler, process, times, x, step, False)


def drive_unipc(scheduler, process, times, x):
    """The samples of diffusers are predictions, which the next call corrects: `last_sample`. The step to the image is of
    order 1 for any B(h), but diffusers computes 0 times infinity for `bh1`."""
    corrected = []

    def step(out, t, sample, i):
        result = scheduler.step(out, t, sample).prev_sample
        corrected.append(scheduler.last_sample)
        return result

    predicted = drive(scheduler, process, times, x, step, False)
    last = scheduler.model_outputs[-1]
    assert scheduler.config.solver_type == "bh1" or (last - predicted[-1]).abs().max() < 1e-12
    return torch.stack(corrected[1:] + [last])


def third_order(process, times, x):
    """An exponential integrator through the last three predictions, integrated numerically: of order 3. The step to
    the image is of order 1, and with fewer than 15 steps the step before it is of order 2, as in diffusers. Steps of
    order 2 are those of DPM-Solver++(2M)."""
    sigmas = torch.cat([process.sigmas(times[::-1]), torch.zeros(1, dtype=torch.float64)])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    steps, predictions, xs = len(times), [], []
    for i in range(steps):
        s, to = sigmas[i].item(), sigmas[i + 1].item()
        predictions.append(process.mixture.denoised(x * math.sqrt(1 + s * s), sigmas[i]))
        order = min(3, i + 1, 1 if i == steps - 1 else 2 if i == steps - 2 and steps < 15 else 3)
        alpha, decay = 1 / math.sqrt(1 + to * to), to / s * math.sqrt((1 + s * s) / (1 + to * to))
        if order == 1:
            x = decay * x + alpha * (1 - to / s) * predictions[-1]
        elif order == 2:
            r = math.log(sigmas[i - 1] / s) / math.log(s / to)
            mean = (1 + 1 / (2 * r)) * predictions[-1] - 1 / (2 * r) * predictions[-2]
            x = decay * x + alpha * (1 - to / s) * mean
        else:
            h = math.log(s / to)
            at = [-math.log(sigmas[i - k].item() / s) for k in range(3)]
            x = decay * x
            for node, weight in zip(h / 2 * (nodes + 1), h / 2 * weights):
                for k in range(3):
                    others = [j for j in range(3) if j != k]
                    lagrange = math.prod((node - at[j]) / (at[k] - at[j]) for j in others)
                    x = x + alpha * weight * math.exp(node - h) * lagrange * predictions[-1 - k]
        xs.append(x)
    return torch.stack(xs)


def edm(process, times, x, z):
    """Karras et al. 2022, algorithm 2. sigma is never raised above that of the last timestep."""
    sigmas = torch.cat([process.sigmas(times[::-1]), torch.zeros(1, dtype=torch.float64)])
    largest, xs = process.table[-1], []
    y = x * (1 + sigmas[0] ** 2).sqrt()
    for i in range(len(times)):
        sigma, to = sigmas[i], sigmas[i + 1]
        churns = CHURN["min"] <= sigma <= CHURN["max"]
        gamma = min(CHURN["amount"] / len(times), math.sqrt(2) - 1) if churns else 0
        hat = torch.minimum(sigma * (1 + gamma), largest) if gamma else sigma
        y_hat = y + (hat**2 - sigma**2).clamp(min=0).sqrt() * CHURN["noise"] * z[i]
        d = (y_hat - process.mixture.denoised(y_hat, hat)) / hat
        y = y_hat + (to - hat) * d
        if to > 0:
            d_2 = (y - process.mixture.denoised(y, to)) / to
            y = y_hat + (to - hat) * (d + d_2) / 2
        xs.append(y / (1 + to**2).sqrt())
    return torch.stack(xs)


def inversion(process, times, x):
    total = len(process.betas)
    scheduler = DDIMInverseScheduler(total, trained_betas=process.betas.tolist(), clip_sample=False)
    scheduler.alphas_cumprod = process.alpha_bars
    scheduler.num_inference_steps = len(times)
    xs, before = [], -1
    for t in times.astype(int).tolist():
        # diffusers takes the previous timestep to be t - total // steps.
        scheduler.register_to_config(num_train_timesteps=(t - before) * len(times))
        x = scheduler.step(process.noise(x, process.table[t]), t, x).prev_sample
        xs.append(x)
        before = t
    return torch.stack(xs)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--schedule", default="linear", choices=["linear", "cosine", "scaled_linear", "sigmoid"])
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--shape", type=int, nargs=4, default=[2, 1, 1, 3])
    p.add_argument("--rho", type=float, default=7.0)
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(args.seed)
    mixture = Mixture(generator)
    process = Process(schedules()[f"schedule.{args.schedule}.betas"], mixture)
    x_T = torch.randn(args.shape, generator=generator, dtype=torch.float64)
    z = torch.randn(args.steps, *args.shape, generator=generator, dtype=torch.float64)
    tensors = {"betas": process.betas, "x_T": x_T, "z": z}
    tensors |= {f"mixture.{key}": getattr(mixture, key) for key in ("weights", "means", "stds")}
    cases = {}

    def add(name, xs, **case):
        cases[name], tensors[name] = case, xs
        assert xs.isfinite().all(), name

    worst = {}
    for spacing, (value, times) in spacings(process, args.steps, args.rho).items():
        tensors[f"times.{spacing}"] = torch.from_numpy(times)
        for name, solver in SOLVERS.items():
            case = {"solver": solver, "spacing": value, "times": f"times.{spacing}"}
            if name == "edm":
                xs = edm(process, times, x_T, z)
            elif name == "dpm_3m":
                xs = third_order(process, times, x_T)
                theirs = of_diffusers(name, process, times, x_T, z, None)
                worst[spacing] = (theirs - xs).abs().max().item()
            else:
                xs = of_diffusers(name, process, times, x_T, z, None)
            add(f"{name}.{spacing}", xs, **case)
        if spacing in ("even", "karras"):
            for name in ("dpm_2m", "dpm_sde", "unipc_2_bh2"):
                xs = of_diffusers(name, process, times, x_T, z, THRESHOLD)
                case = {"solver": SOLVERS[name], "spacing": value, "times": f"times.{spacing}"}
                add(f"threshold.{name}.{spacing}", xs, **case, threshold=THRESHOLD)
        if (times == times.round()).all():
            case = {"spacing": value, "times": f"times.{spacing}", "solver": "heun", "inversion": True}
            add(f"inversion.{spacing}", inversion(process, times, 0.8 * x_T), **case)
    metadata = {"cases": json.dumps(cases), "arguments": json.dumps({k: v for k, v in vars(args).items() if k != "out"})}
    metadata |= {m.__name__: m.__version__.split("+")[0] for m in (diffusers, torch, np)}
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, args.out, metadata)
    print(f"{len(cases)} cases; diffusers' 3M is away by", {key: f"{value:.1e}" for key, value in worst.items()})


if __name__ == "__main__":
    main()
