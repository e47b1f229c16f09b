"""Writes what PyTorch computes with a small U-Net of random weights.

    python pytorch_fixtures.py OUT.safetensors [--image-size 16] [--channels 1] [--hidden-dims 8 16 16]
        [--time-dim 16] [--attention LEVEL ...] [--batch 3] [--seed 0] [--train-steps 4] [--sample-steps 20]

The file's tensors and metadata are described in ../README.md.
"""
import argparse
import dataclasses
import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from reference import LinearSchedule, UNet, UNetConfig, check_moves

BETA_START, BETA_END = 1e-3, 0.2  # of the short schedule that training and sampling use
TRAIN = {"lr": 2e-4, "weight_decay": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "clip_norm": 1.0, "ema_decay": 0.9}


def arguments():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--image-size", type=int, default=16)
    p.add_argument("--channels", type=int, default=1)
    p.add_argument("--hidden-dims", type=int, nargs="+", default=[8, 16, 16])
    p.add_argument("--time-dim", type=int, default=16)
    p.add_argument("--attention", type=int, nargs="*", default=[])
    p.add_argument("--batch", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--train-steps", type=int, default=4)
    p.add_argument("--sample-steps", type=int, default=20)
    return p.parse_args()


def snapshot(net, prefix):
    return {f"{prefix}.{name}": w.detach().clone() for name, w in net.named_parameters()}


def random_network(config):
    net = UNet(config)
    with torch.no_grad():
        for w in net.parameters():
            if w.dim() == 1:  # norms begin at exactly 1 and 0: move them, so that one swapped or left out shows
                w.add_(0.1 * torch.randn_like(w))
    return net


def one_batch(net, x, t, eps):
    out = net(x, t)
    loss = F.mse_loss(out, eps)
    loss.backward()
    grads = {f"grad.{name}": w.grad.clone() for name, w in net.named_parameters()}
    net.double()
    with torch.no_grad():
        out_f64 = net(x.double(), t)
    net.float()  # exact: every weight came from float32
    return {"x": x, "t": t, "eps": eps, "out": out, "out_f64": out_f64, "loss": loss} | grads


def training(net, x_0, t, eps, schedule):
    """Leaves `net` trained."""
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=TRAIN["lr"], betas=TRAIN["betas"], eps=TRAIN["eps"], weight_decay=TRAIN["weight_decay"]
    )
    ema, losses = snapshot(net, "ema"), []
    for batch in range(len(x_0)):
        x_t = schedule.noised(x_0[batch], eps[batch], t[batch])
        loss = F.mse_loss(net(x_t, t[batch]), eps[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), TRAIN["clip_norm"])
        optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            for name, w in net.named_parameters():
                ema[f"ema.{name}"].mul_(TRAIN["ema_decay"]).add_(w, alpha=1 - TRAIN["ema_decay"])
    run = {"train.x0": x_0, "train.t": t, "train.eps": eps, "train.loss": torch.stack(losses)}
    return run | snapshot(net, "trained") | ema


@torch.no_grad()
def sampling(net, x_T, z, schedule):
    x = x_T
    for t in reversed(range(len(z))):
        eps = net(x, torch.full((len(x),), t))
        x = schedule.denoised(x, eps, z[t], t)
    return {"sample.betas": schedule.betas, "sample.x_T": x_T, "sample.z": z, "sample.x_0": x}


def main():
    check_moves()
    a = arguments()
    torch.set_num_threads(1)  # so that sums always run in the same order
    # The order of random draws is part of the format: weights, batch, training run, sampling run.
    torch.manual_seed(a.seed)
    config = UNetConfig(a.image_size, a.channels, a.hidden_dims, a.time_dim, a.attention)
    schedule = LinearSchedule(a.sample_steps, BETA_START, BETA_END)
    shape = (a.batch, a.channels, a.image_size, a.image_size)
    net = random_network(config)
    weights = snapshot(net, "weights")

    x, eps = torch.randn(shape), torch.randn(shape)
    t = torch.randint(0, 1000, (a.batch,))
    tensors = weights | one_batch(net, x, t, eps)

    x_0 = torch.rand((a.train_steps, *shape)) * 2 - 1
    t = torch.randint(0, a.sample_steps, (a.train_steps, a.batch))
    eps = torch.randn((a.train_steps, *shape))
    tensors |= training(net, x_0, t, eps, schedule)

    net.load_state_dict({name.removeprefix("weights."): w for name, w in weights.items()})
    x_T, z = torch.randn(shape), torch.randn((a.sample_steps, *shape))
    tensors |= sampling(net, x_T, z, schedule)

    sample = {"steps": a.sample_steps, "beta_start": BETA_START, "beta_end": BETA_END}
    sample |= {"variance": "beta", "clip": False}
    metadata = {"config": dataclasses.asdict(config), "train": TRAIN, "sample": sample}
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        a.out,
        {key: json.dumps(value) for key, value in metadata.items()},
    )
    error = (tensors["out"] - tensors["out_f64"]).abs().max().item()
    print(f"{a.out}: {sum(w.numel() for w in weights.values())} weights; out is off by {error:.1e} in float32")


if __name__ == "__main__":
    main()
