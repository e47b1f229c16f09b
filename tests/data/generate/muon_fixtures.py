"""Writes what torch.optim.Muon does to a few small matrices, and what torch's schedulers do to a learning rate.

    python muon_fixtures.py MUON.safetensors SCHEDULES.json

Both files are described in ../README.md.
"""
import argparse
import json

import torch
from safetensors.torch import save_file

SHAPES = [(5, 7), (7, 5), (6, 6), (4, 3, 3, 3), (1, 9)]
STEPS = 4
CASES = {
    "muon": {},
    "muon_plain": {"nesterov": False, "momentum": 0.8},
    "muon_decay": {"weight_decay": 0.3},
}
DEFAULTS = {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.95, "nesterov": True}

# PyTorch rounds the matrices to bf16 before the iterations. Without this step, they stay in float64.
torch.Tensor.bfloat16 = torch.Tensor.clone


def run(case, params, gradients, name, tensors):
    # PyTorch's Muon takes matrices only.
    weights = [torch.nn.Parameter(p.double().flatten(1)) for p in params]
    optimizer = torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw", **case)
    for step in range(1, STEPS + 1):
        for i, (weight, gradient) in enumerate(zip(weights, gradients[step - 1])):
            weight.grad = gradient.double().flatten(1)
        optimizer.step()
        for i, weight in enumerate(weights):
            tensors[f"{name}.after.{step}.{i}"] = weight.detach().reshape(SHAPES[i]).clone()
    for i, weight in enumerate(weights):
        buffer = optimizer.state[weight]["momentum_buffer"]
        tensors[f"{name}.momentum_buffer.{i}"] = buffer.reshape(SHAPES[i]).clone()


def schedule(make, steps):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("muon")
    parser.add_argument("schedules")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [
        [10 ** (k - 2) * torch.randn(shape, generator=generator) for shape in SHAPES] for k in range(STEPS)
    ]
    gradients[2][0].zero_()
    tensors = {f"param.{i}": p for i, p in enumerate(params)}
    for step, of_step in enumerate(gradients, 1):
        tensors.update({f"grad.{step}.{i}": g for i, g in enumerate(of_step)})
    metadata = {"torch": torch.__version__, "cases": json.dumps(list(CASES))}
    for name, changes in CASES.items():
        case = DEFAULTS | changes
        metadata[name] = json.dumps(case)
        run(case, params, gradients, name, tensors)
    save_file(tensors, args.muon, metadata)

    of = torch.optim.lr_scheduler
    rates = {
        "linear": schedule(lambda o: of.LinearLR(o, 1.0, 0.25, total_iters=8), 10),
        "cosine": schedule(lambda o: of.CosineAnnealingLR(o, T_max=8, eta_min=0.03), 9),
        # The warm-up ends where the cosine begins.
        "cosine_after_warmup": schedule(
            lambda o: of.SequentialLR(
                o, [of.LinearLR(o, 0.25, 1.0, total_iters=3), of.CosineAnnealingLR(o, T_max=8)], milestones=[4]
            ),
            12,
        ),
    }
    with open(args.schedules, "w") as file:
        json.dump({"torch": torch.__version__, "lr": 0.3, **rates}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
