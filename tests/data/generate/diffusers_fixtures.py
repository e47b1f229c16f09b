"""Writes noise schedules, and what the samplers of diffusers do with a known network and known noise.

    python diffusers_fixtures.py OUT.safetensors

The file's tensors and metadata are described in ../README.md.
"""
import argparse
import json
import types
from unittest import mock

import diffusers
import numpy
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from safetensors.torch import save_file

STEPS = 1000
DIFFUSERS_NAME = {"cosine": "squaredcos_cap_v2"}
NETWORK = "tanh(0.7 * x + 0.001 * t)"


def network(x, t):
    return torch.tanh(0.7 * x + 0.001 * t)


def linear_betas():
    return torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)


def cosine_betas():
    """diffusers' own code, which works in Python's float64 and rounds only its result, without that rounding."""

    class Float64Torch:
        Tensor = torch.Tensor
        float32 = None

        @staticmethod
        def tensor(values, dtype):
            return torch.tensor(values, dtype=torch.float64)

    code = scheduling_ddpm.betas_for_alpha_bar.__code__
    names = scheduling_ddpm.betas_for_alpha_bar.__globals__ | {"torch": Float64Torch}
    return types.FunctionType(code, names)(STEPS, max_beta=0.999, alpha_transform_type="cosine")


def schedules():
    betas = {
        "linear": linear_betas(),
        "cosine": cosine_betas(),
        # evenly spaced square roots, and evenly spaced logits from -6 to 6: diffusers' formulae, in float64
        "scaled_linear": torch.linspace(1e-4**0.5, 0.02**0.5, STEPS, dtype=torch.float64) ** 2,
        "sigmoid": torch.sigmoid(torch.linspace(-6, 6, STEPS, dtype=torch.float64)) * (0.02 - 1e-4) + 1e-4,
        "linear_zero_snr": rescale_zero_terminal_snr(linear_betas()),
    }
    tensors = {}
    for name, b in betas.items():
        tensors[f"schedule.{name}.betas"] = b
        tensors[f"schedule.{name}.alpha_bars"] = (1 - b).cumprod(0)
    for name in ("linear", "cosine", "scaled_linear", "sigmoid"):
        rounded = DDPMScheduler(STEPS, 1e-4, 0.02, DIFFUSERS_NAME.get(name, name)).betas
        assert (rounded - betas[name]).abs().max() < 1e-7, name
        tensors[f"schedule.{name}.betas_f32"] = rounded
    return tensors


def spaced_timesteps(steps, counts):
    """As in Nichol and Dhariwal's code (2021): `steps` is cut into as many sections as there are counts; each count is
    spread over its section, both ends included, by adding up a fractional stride and rounding halves to even."""
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (1 if i < steps % len(counts) else 0)
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    assert kept == sorted(set(kept))
    return kept


def strided_timesteps(steps, count):
    """As in DDIM's code: the first integer stride from 0 that gives exactly `count`."""
    return next(list(range(0, steps, s)) for s in range(1, steps) if len(range(0, steps, s)) == count)


def spacings():
    tensors = {}
    for count in (1, 2, 3, 7, 10, 20, 50, 100, 250, 1000):
        tensors[f"spacing.1000.{count}"] = spaced_timesteps(1000, [count])
    tensors["spacing.300.10-15-20"] = spaced_timesteps(300, [10, 15, 20])
    tensors["spacing.1000.7-5-3"] = spaced_timesteps(1000, [7, 5, 3])
    for count in (10, 20, 50, 100, 250):
        tensors[f"spacing.1000.ddim{count}"] = strided_timesteps(1000, count)
    return {key: torch.tensor(values) for key, values in tensors.items()}


DDPM = {
    "ddpm_small": {"variance_type": "fixed_small"},
    "ddpm_large": {"variance_type": "fixed_large"},
    "ddpm_small_clip": {"variance_type": "fixed_small", "clip_sample": True},
    "ddpm_large_clip": {"variance_type": "fixed_large", "clip_sample": True},
    "ddpm_large_leading": {"variance_type": "fixed_large", "spacing": "leading"},
    "ddpm_large_all": {"variance_type": "fixed_large", "spacing": "all", "shape": [1, 1, 2, 2]},
    "ddpm_small_cosine_clip": {"variance_type": "fixed_small", "schedule": "cosine", "clip_sample": True},
    "ddpm_sample": {"variance_type": "fixed_small", "prediction_type": "sample"},
    "ddpm_v": {"variance_type": "fixed_small", "prediction_type": "v_prediction"},
    "ddpm_small_threshold": {
        "variance_type": "fixed_small",
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 3.0,
    },
}
DDIM = {
    "ddim_0": {"eta": 0.0},
    "ddim_05": {"eta": 0.5},
    "ddim_1": {"eta": 1.0},
    "ddim_0_clip": {"eta": 0.0, "clip_sample": True},
    "ddim_05_clip": {"eta": 0.5, "clip_sample": True},
    "ddim_1_clip": {"eta": 1.0, "clip_sample": True},
    "ddim_0_trailing": {"eta": 0.0, "spacing": "trailing"},
    "ddim_05_linspace": {"eta": 0.5, "spacing": "linspace"},
    "ddim_0_cosine_clip": {"eta": 0.0, "schedule": "cosine", "clip_sample": True},
    "ddim_sample": {"eta": 0.5, "prediction_type": "sample"},
    "ddim_v": {"eta": 0.5, "prediction_type": "v_prediction"},
}
DEFAULTS = {
    "schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "count": 20,
    "shape": [2, 1, 4, 4],
}
OPTIONS = ("prediction_type", "clip_sample", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def use_float64_tables(scheduler, betas):
    """diffusers keeps betas and their products in float32, which alone would put the trajectories about 1e-5 apart;
    with these tables everything is computed in float64. (Its 1.0 for abar before timestep 0 is exact as it is.)"""
    scheduler.betas = betas
    scheduler.alphas = 1 - betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)


def make(case, betas):
    options = {key: case[key] for key in OPTIONS} | {"beta_start": 1e-4, "beta_end": 0.02}
    options["beta_schedule"] = DIFFUSERS_NAME.get(case["schedule"], case["schedule"])
    if case["spacing"] != "all":
        options["timestep_spacing"] = case["spacing"]
    if case["sampler"] == "DDPM":
        scheduler = DDPMScheduler(STEPS, variance_type=case["variance_type"], **options)
    else:
        scheduler = DDIMScheduler(STEPS, set_alpha_to_one=True, **options)
    if betas is not None:
        use_float64_tables(scheduler, betas)
    if case["spacing"] != "all":
        scheduler.set_timesteps(case["count"])
    return scheduler


def ddpm_step(scheduler, case, out, t, x, z):
    with mock.patch.object(scheduling_ddpm, "randn_tensor", lambda *_, **__: z):
        return scheduler.step(out, t, x)


def ddim_step(scheduler, case, out, t, x, z):
    # diffusers takes the previous timestep to be t - 1000 // count, which is right for evenly strided timesteps only.
    # Scaling this number makes that the real neighbour; nothing else in the step reads it.
    later = scheduler.timesteps[scheduler.timesteps < t]
    gap = int(t - later[0]) if len(later) else int(t) + 1
    scheduler.register_to_config(num_train_timesteps=gap * scheduler.num_inference_steps)
    # use_clipped_model_output: eps is derived again from a clipped x_0. It is off by default in diffusers.
    noise = z if case["eta"] > 0 else None
    return scheduler.step(out, t, x, eta=case["eta"], use_clipped_model_output=True, variance_noise=noise)


def sample(case, betas, x_T, z):
    scheduler = make(case, betas)
    step = ddpm_step if case["sampler"] == "DDPM" else ddim_step
    x, xs, x_0s = x_T, [], []
    for i, t in enumerate(scheduler.timesteps.tolist()):
        result = step(scheduler, case, network(x, t), t, x, z[i])
        x = result.prev_sample
        xs.append(x)
        x_0s.append(result.pred_original_sample)
    assert x.dtype == x_T.dtype
    return {"timesteps": scheduler.timesteps, "x": torch.stack(xs), "pred_x_0": torch.stack(x_0s)}


def sigmas(case, betas, timesteps):
    """The standard deviation of the noise that each step added: read off by giving noise 1 to x = 0 with output 0."""
    scheduler = make(case | {"prediction_type": "epsilon"}, betas)
    step = ddpm_step if case["sampler"] == "DDPM" else ddim_step
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    noises = [step(scheduler, case, zero, t, zero, zero + 1).prev_sample for t in timesteps.tolist()]
    return torch.cat(noises).flatten()


def relative_error(x, exact):
    return ((x.double() - exact).abs().max() / exact.abs().max()).item()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    out = p.parse_args().out
    torch.set_num_threads(1)
    tensors = schedules() | spacings()
    cases = {name: DEFAULTS | {"sampler": "DDPM", "spacing": "linspace"} | case for name, case in DDPM.items()}
    cases |= {name: DEFAULTS | {"sampler": "DDIM", "spacing": "leading"} | case for name, case in DDIM.items()}
    metadata = {"cases": json.dumps(list(cases)), "network": NETWORK}
    metadata |= {m.__name__: m.__version__.split("+")[0] for m in (diffusers, torch, numpy)}
    for seed, (name, case) in enumerate(cases.items()):
        if case["spacing"] == "all":
            case["count"] = STEPS
        generator = torch.Generator().manual_seed(seed)
        x_T = torch.randn(case["shape"], generator=generator, dtype=torch.float64)
        z = torch.randn(case["count"], *case["shape"], generator=generator, dtype=torch.float64)
        betas = tensors[f"schedule.{case['schedule']}.betas"]
        run = sample(case, betas, x_T, z)
        run |= {"x_T": x_T, "z": z, "sigma": sigmas(case, betas, run["timesteps"])}
        tensors |= {f"{name}.{key}": value for key, value in run.items()}
        errors = {
            "float32_error": relative_error(sample(case, betas, x_T.float(), z.float())["x"], run["x"]),
            "diffusers_float32_error": relative_error(sample(case, None, x_T.float(), z.float())["x"], run["x"]),
        }
        metadata[name] = json.dumps(case | errors)
        print(f"{name}: |x| <= {run['x'].abs().max():.3g}", {key: f"{error:.1e}" for key, error in errors.items()})
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, out, metadata)


if __name__ == "__main__":
    main()
