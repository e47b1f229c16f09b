"""Numbers from an integer hash: weights and images that a test of the crate computes again."""
import math

import numpy as np
import torch


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
    if name.endswith("running_var") or name.endswith(".weight") and len(shape) == 1:
        return unit + np.float32(0.5)
    bound = math.sqrt(6 / math.prod(shape[1:])) if len(shape) > 1 else 0.2
    return (unit * np.float32(2) - np.float32(1)) * np.float32(bound)


def weights(state):
    """Weights of the names and shapes of a state_dict. The numbers of the streams are those of the names in order."""
    shapes = {k: list(v.shape) for k, v in state.items() if v.is_floating_point()}
    return {k: torch.from_numpy(made(i, k, shapes[k])) for i, k in enumerate(sorted(shapes))}


def image(stream, shape):
    """Bytes: waves of each channel, and noise."""
    count, channels, height, width = shape
    at = np.arange(math.prod(shape), dtype=np.uint32)
    column, row = at % width, at // width % height
    channel, number = at // (width * height) % channels, at // (width * height * channels)
    smooth = column * (3 + channel) + row * (5 + number) + 40 * channel
    smooth = np.where(smooth // 128 % 2 == 0, smooth % 128, 127 - smooth % 128)
    return torch.from_numpy((smooth + (hashed(stream, len(at)) >> np.uint32(25))).astype(np.uint8).reshape(shape))
