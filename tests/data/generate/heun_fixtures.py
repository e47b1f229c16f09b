"""Writes what the Heun sampler of diffusers does with a known network.

    python heun_fixtures.py OUT.safetensors

The file's tensors and metadata are described in ../README.md.
"""
import argparse
import json

import diffusers
import numpy
import torch
from diffusers import HeunDiscreteScheduler
from diffusers_fixtures import NETWORK, STEPS, cosine_betas, linear_betas, network, relative_error, spaced_timesteps
from safetensors.torch import save_file

COUNT = 10
SHAPE = [2, 1, 4, 4]
DEFAULTS = {"sampler": "Heun", "schedule": "linear", "prediction_type": "epsilon", "clip_sample": False, "first": 999}
CASES = {
    "heun": {},
    "heun_clip": {"clip_sample": True},
    "heun_sample": {"prediction_type": "sample"},
    "heun_v": {"prediction_type": "v_prediction"},
    "heun_cosine_clip": {"schedule": "cosine", "clip_sample": True, "first": 950},
}
BETAS = {"linear": linear_betas(), "cosine": cosine_betas()}


def sample(case, x_T, tables):
    """diffusers keeps its tables in float32; with `tables` they are replaced by float64 ones. Its samples are
    x / sqrt(alpha_bar), so they are converted at the start and after each step."""
    options = {key: case[key] for key in ("prediction_type", "clip_sample")}
    scheduler = HeunDiscreteScheduler(STEPS, trained_betas=BETAS[case["schedule"]].tolist(), **options)
    timesteps = torch.tensor(spaced_timesteps(case["first"] + 1, [COUNT])).flip(0)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    alpha_bars = (1 - BETAS[case["schedule"]]).cumprod(0)[timesteps]
    if tables:
        sigmas = torch.cat([((1 - alpha_bars) / alpha_bars).sqrt(), torch.zeros(1, dtype=torch.float64)])
        assert (scheduler.sigmas[1:-1:2] / sigmas[1:-1] - 1).abs().max() < 1e-3
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    after = torch.cat([alpha_bars[1:], torch.ones(1, dtype=torch.float64)])
    x, xs, x_0s, evaluated = x_T / alpha_bars[0].sqrt().to(x_T.dtype), [], [], []
    for t in scheduler.timesteps.tolist():
        first = scheduler.state_in_first_order
        result = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x)
        x = result.prev_sample
        evaluated.append(int(t))
        if first:
            x_0s.append(result.pred_original_sample)
        if scheduler.state_in_first_order:
            xs.append(x * after[len(xs)].sqrt().to(x_T.dtype))
    # The last step has one evaluation: it never leaves the first order.
    xs.append(x)
    assert x.dtype == x_T.dtype and len(xs) == len(x_0s) == COUNT
    run = {"timesteps": timesteps, "evaluated": torch.tensor(evaluated)}
    return run | {"x": torch.stack(xs), "pred_x_0": torch.stack(x_0s)}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    out = p.parse_args().out
    torch.set_num_threads(1)
    cases = {name: DEFAULTS | case for name, case in CASES.items()}
    tensors = {}
    metadata = {"cases": json.dumps(list(cases)), "network": NETWORK}
    metadata |= {m.__name__: m.__version__.split("+")[0] for m in (diffusers, torch, numpy)}
    for seed, (name, case) in enumerate(cases.items()):
        x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        run = sample(case, x_T, True)
        tensors |= {f"{name}.{key}": value for key, value in (run | {"x_T": x_T}).items()}
        error = relative_error(sample(case, x_T.float(), False)["x"], run["x"])
        metadata[name] = json.dumps(case | {"diffusers_float32_error": error})
        print(f"{name}: |x| <= {run['x'].abs().max():.3g}, float32 {error:.1e}")
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, out, metadata)


if __name__ == "__main__":
    main()
