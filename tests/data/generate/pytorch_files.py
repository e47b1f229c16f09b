"""Writes small files with torch.save, in both of its formats, and the values of their tensors.

    python pytorch_files.py OUT

The content is described in ../README.md.
"""
import argparse
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file


class Command:
    """An object whose pickle runs a command when Python reads it."""

    def __reduce__(self):
        return os.system, ("echo this must not run",)


def state():
    """A state dict with the types and the views that occur in such files."""
    base = torch.randn(4, 6)
    shared = torch.randn(10)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    tensors = OrderedDict(module.state_dict(keep_vars=True))
    tensors._metadata = module.state_dict()._metadata
    return OrderedDict(tensors) | {
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "transposed": base.t(),
        "columns": base[:, 1:5:2],
        "first": shared[:4],
        "last": shared[6:].reshape(2, 2),
        "again": shared,
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(2, 1, 2).bfloat16(),
        "double": torch.randn(5, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def trainer(tensors):
    """As the trainer of denoising-diffusion-pytorch saves it, with an optimiser's state."""
    weight = torch.nn.Parameter(torch.randn(2, 3))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.randn(2, 3)
    optimizer.step()
    average = {"initted": torch.tensor(True), "step": torch.tensor([3])}
    average |= {f"ema_model.model.{name}": tensor for name, tensor in tensors.items()}
    model = {f"model.{name}": tensor for name, tensor in tensors.items()}
    parts = {"step": 3, "model": model, "opt": optimizer.state_dict(), "ema": average}
    return parts | {"scaler": None, "version": "2.3.0", "seed": 2**70, "loss": 0.5, "lists": [[torch.ones(2)], (1, 2)]}


def overlap(path):
    """Lets the entries of all storages of an archive begin at that of the first, and cuts the others off."""
    with zipfile.ZipFile(path, "a") as archive:
        storages = [entry for entry in archive.filelist if "/data/" in entry.filename]
        first, second = storages[:2]
        archive.start_dir = second.header_offset
        archive.filelist = [entry for entry in archive.filelist if entry.header_offset < archive.start_dir]
        for entry in storages[1:]:
            entry.header_offset = first.header_offset
            archive.filelist.append(entry)
        archive._didModify = True


def values(tensors):
    """The floating-point tensors, each with its own storage."""
    floats = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in floats.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    torch.manual_seed(0)
    tensors = state()
    for name, value in {"state": tensors, "hostile": {"weight": torch.ones(2), "args": Command()}}.items():
        torch.save(value, out / f"{name}.pt")
        torch.save(value, out / f"{name}-legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(trainer(tensors), out / "trainer.pt")
    torch.save(tensors, out / "state-protocol-4.pt", pickle_protocol=4)
    torch.save({f"w{i}": torch.zeros(500) for i in range(20)}, out / "overlapping.pt")
    overlap(out / "overlapping.pt")
    save_file(values(tensors), out / "expected.safetensors")


if __name__ == "__main__":
    main()
