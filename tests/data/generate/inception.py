"""Writes the features and logits that pytorch-fid and torch-fidelity compute from images.

    python inception.py OUT_DIR [--save-weights] [--weights FILE.pth]

Weights and images are made by a formula, which the test of the crate computes again, so OUT_DIR/inception.safetensors
holds only results, and the names and shapes of the weights. With --weights, the weights are those of a file of PyTorch.
With --weights or --save-weights, OUT_DIR/weights.safetensors holds the weights. Nothing is downloaded.
"""
import argparse
import json
import math
import os
import tempfile

import numpy as np
import pytorch_fid.inception as pytorch_fid
import torch
import torchvision
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

# Count, channels, height, width.
IMAGES = {"colour": (2, 3, 32, 32), "full": (1, 3, 299, 299), "grey": (1, 1, 340, 20)}


def hashed(stream, count):
    """32 random bits for each of `count` numbers of a stream."""
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(stream) * np.uint32(0x85EBCA6B)
        for factor in (0x7FEB352D, 0x846CA68B):
            x = (x ^ x >> np.uint32(16)) * np.uint32(factor)
        return x ^ x >> np.uint32(16)


def made(stream, name, shape):
    """The values of a weight: uniform, of a size that keeps the size of feature maps."""
    unit = ((hashed(stream, math.prod(shape)) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
    if name.endswith(("running_var", "bn.weight")):
        return unit + np.float32(0.5)
    bound = math.sqrt(6 / math.prod(shape[1:])) if len(shape) > 1 else 0.2
    return (unit * np.float32(2) - np.float32(1)) * np.float32(bound)


def image(stream, shape):
    """Bytes: waves of each channel, and noise."""
    count, channels, height, width = shape
    at = np.arange(math.prod(shape), dtype=np.uint32)
    column, row = at % width, at // width % height
    channel, number = at // (width * height) % channels, at // (width * height * channels)
    smooth = column * (3 + channel) + row * (5 + number) + 40 * channel
    smooth = np.where(smooth // 128 % 2 == 0, smooth % 128, 127 - smooth % 128)
    return torch.from_numpy((smooth + (hashed(stream, len(at)) >> np.uint32(25))).astype(np.uint8).reshape(shape))


def weights():
    """Weights by the formula. The numbers of the streams are those of the names in their order."""
    shapes = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    shapes = {k: list(v.shape) for k, v in shapes.state_dict().items() if v.is_floating_point()}
    return {k: torch.from_numpy(made(i, k, shapes[k])) for i, k in enumerate(sorted(shapes))}


def networks(state):
    """Both programs' networks with these weights."""
    pytorch_fid.load_state_dict_from_url = lambda *_, **__: state
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        fidelity = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], file.name)
    return pytorch_fid.InceptionV3([3]).eval(), fidelity


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--save-weights", action="store_true")
    parser.add_argument("--weights")
    args = parser.parse_args()
    state = torch.load(args.weights, weights_only=True) if args.weights else weights()
    fid, fidelity = networks(state)
    found = {}
    with torch.inference_mode():
        for stream, (name, shape) in enumerate(IMAGES.items()):
            pixels = image(1000 + stream, shape).expand(-1, 3, -1, -1)
            features = fid(pixels / 255)[0].flatten(1)
            found[f"{name}.pytorch_fid.features"] = features
            found[f"{name}.pytorch_fid.logits"] = features @ state["fc.weight"].T
            features, logits = fidelity(pixels)
            found[f"{name}.tensorflow_1.features"] = features
            found[f"{name}.tensorflow_1.logits"] = logits
    shapes = {k: list(v.shape) for k, v in state.items() if v.is_floating_point()}
    os.makedirs(args.out, exist_ok=True)
    metadata = {"weights": json.dumps(sorted(shapes.items())), "images": json.dumps(IMAGES)}
    save_file({k: v.clone().contiguous() for k, v in found.items()}, f"{args.out}/inception.safetensors", metadata)
    if args.weights or args.save_weights:
        floats = {k: v.contiguous() for k, v in state.items() if v.is_floating_point()}
        save_file(floats, f"{args.out}/weights.safetensors")


if __name__ == "__main__":
    main()
