"""Prints the relative errors of PyTorch's f32 beside its own f64, in both memory layouts.

    python benches/peer/errors.py

Networks have random weights: the output, and all gradients together. Single 3x3 convolutions are of standard normals:
the output, the gradient of the input, and that of the weights. `tests/precision.rs` prints the errors of the crate's
networks, and the unit test `larger_tiles` checks those of its convolutions. Needs the packages of
tests/data/generate/requirements.txt.
"""
import copy
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests/data/generate"))
from reference import UNet, UNetConfig  # noqa: E402

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
NETWORKS = {
    "mnist": UNetConfig(28, 1, [32, 64, 128], 128, []),
    "attentive": UNetConfig(16, 3, [24, 40, 64], 128, [0, 1]),
}
CONVOLUTIONS = [(4, 28, 64), (8, 14, 128), (16, 7, 128)]  # batch, height and width, channels


def relative(found, exact):
    off = sum(((f.double() - e) ** 2).sum() for f, e in zip(found, exact))
    return (off / sum((e**2).sum() for e in exact)).sqrt().item()


def network(net, dtype, layout, inputs):
    x, t, target = inputs
    net = copy.deepcopy(net).to(dtype, memory_format=layout)
    y = net(x.to(dtype, memory_format=layout), t)
    y.backward(y.detach() - target.to(dtype))
    return [y.detach()], [p.grad for p in net.parameters()]


def convolution(inputs, dtype, layout):
    x, w, dy = [v.to(dtype, memory_format=layout) for v in inputs]
    x.requires_grad_(), w.requires_grad_()
    y = torch.nn.functional.conv2d(x, w, padding=1)
    y.backward(dy)
    return [y.detach()], [x.grad], [w.grad]


def main():
    for layout, memory_format in LAYOUTS.items():
        for name, config in NETWORKS.items():
            torch.manual_seed(3)
            net = UNet(config).eval()
            x = torch.randn(2, config.channels, config.image_size, config.image_size)
            inputs = (x, torch.tensor([40, 700]), torch.randn_like(x))
            exact = network(net, torch.float64, memory_format, inputs)
            found = network(net, torch.float32, memory_format, inputs)
            errors = [f"{relative(f, e):.1e}" for f, e in zip(found, exact)]
            print(f"{layout}, {name}:", ", ".join(errors))
        for batch, size, channels in CONVOLUTIONS:
            torch.manual_seed(7)
            map_, kernel = (batch, channels, size, size), (channels, channels, 3, 3)
            inputs = [torch.randn(shape) for shape in (map_, kernel, map_)]
            exact = convolution(inputs, torch.float64, memory_format)
            found = convolution(inputs, torch.float32, memory_format)
            errors = [f"{relative(f, e):.1e}" for f, e in zip(found, exact)]
            print(f"{layout}, {batch} maps of {size}x{size}, {channels} channels:", ", ".join(errors))


if __name__ == "__main__":
    main()
