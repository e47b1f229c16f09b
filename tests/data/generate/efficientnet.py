"""Writes the features and logits that efficientnet-lite-pytorch computes from images with EfficientNet-lite0.

    python efficientnet.py OUT_DIR

Weights and images are made by a formula, as those of inception.py. Images are scaled by torchvision and Pillow, as
that package does. The input is (byte - 127) / 128, as in the training of the published weights. Nothing is downloaded.
"""
import json
import os
import sys

import formula
import torch
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file
from torchvision import transforms

# Count, channels, height, width.
IMAGES = {"colour": (1, 3, 32, 32), "grey": (1, 1, 340, 20)}


def prepare(image):
    """The input for an image. Rows are scaled first: some versions of Pillow scale columns first, if it is faster."""
    image = transforms.functional.to_pil_image(image)
    for size in ((image.height, 224), (224, 224)):
        image = transforms.functional.resize(image, size)
    return (transforms.functional.pil_to_tensor(image).float() - 127) / 128


def main():
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    state = formula.weights(network.state_dict())
    network.load_state_dict(state, strict=False)
    found = {}
    with torch.inference_mode():
        for stream, (name, shape) in enumerate(IMAGES.items()):
            pixels = formula.image(1000 + stream, shape).expand(-1, 3, -1, -1)
            inputs = torch.stack([prepare(image) for image in pixels])
            found[f"{name}.features"] = network.extract_features(inputs).mean((2, 3))
            found[f"{name}.logits"] = network(inputs)
    shapes = {k: list(v.shape) for k, v in state.items()}
    os.makedirs(sys.argv[1], exist_ok=True)
    metadata = {"weights": json.dumps(sorted(shapes.items())), "images": json.dumps(IMAGES)}
    save_file(found, f"{sys.argv[1]}/efficientnet.safetensors", metadata)


if __name__ == "__main__":
    main()
