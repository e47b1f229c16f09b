"""Writes the features and logits that pytorch-fid and torch-fidelity compute from images.

    python inception.py OUT_DIR [--save-weights] [--weights FILE.pth]

Weights and images are made by a formula, which the test of the crate computes again, so OUT_DIR/inception.safetensors
holds only results, and the names and shapes of the weights. With --weights, the weights are those of a file of PyTorch.
With --weights or --save-weights, OUT_DIR/weights.safetensors holds the weights. Nothing is downloaded.
"""
import argparse
import json
import os
import tempfile

import formula
import pytorch_fid.inception as pytorch_fid
import torch
import torchvision
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

# Count, channels, height, width.
IMAGES = {"colour": (2, 3, 32, 32), "full": (1, 3, 299, 299), "grey": (1, 1, 340, 20)}


def weights():
    """Weights by the formula."""
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    return formula.weights(network.state_dict())


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
            pixels = formula.image(1000 + stream, shape).expand(-1, 3, -1, -1)
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
