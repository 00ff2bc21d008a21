"""Modeling: a hash of weights that knows whether it still holds, since hashing them takes seconds."""

from __future__ import annotations

import weakref
from hashlib import sha256

import torch
from torch import Tensor


class HashedTensors:
    """A SHA-256 of tensors, and what tells whether it still holds.

    A tensor is the same if it is the same object at the same address, with the same version counter and the same
    sample of values: memory that was freed is given out again; and neither `weight.data += delta`, as PEFT merges
    adapters, nor writing to inference tensors moves the counter. What changes a few values behind autograd's back may
    stay unseen, until the model's `train()` or `eval()` is called.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = [weakref.ref(tensor) for tensor in tensors.values()]
        self._places, self._values = _places(tensors), _sample(tensors)
        digest = sha256()
        for name, tensor in tensors.items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.digest = digest.hexdigest()

    def is_of(self, tensors: dict[str, Tensor]) -> bool:
        """Whether these are the tensors that were hashed, with the same values as far as can be told at once."""
        same = len(tensors) == len(self._tensors) and all(
            known() is tensor for known, tensor in zip(self._tensors, tensors.values(), strict=True)
        )
        return same and _places(tensors) == self._places and _sample(tensors) == self._values

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copied or pickled model has other tensors


def _places(tensors: dict[str, Tensor]) -> list[tuple[str, int, int | None]]:
    """Names, addresses and version counters."""
    return [(n, t.data_ptr(), None if t.is_inference() else t._version) for n, t in tensors.items()]


def _sample(tensors: dict[str, Tensor]) -> bytes:
    """About a hundred values of each tensor, from rows and columns all over it."""
    parts = [t.detach().reshape(-1)[:: _distance(t)].to(torch.float32) for t in tensors.values()]
    return b"".join(part.cpu().numpy().tobytes() for part in _by_device(parts))


def _distance(tensor: Tensor) -> int:
    """Between sampled values, about a 64th of them all, which by itself is whole rows or a simple part of a row.

    All would be of a few columns: each lies a golden section (of a row, or of the distance) beside those above.
    """
    distance, width = tensor.numel() // 64, tensor.shape[-1] if tensor.dim() else 1
    if distance >= width > 0:
        return distance - distance % width + int(0.618 * width)
    return max(int(width / (width // distance + 0.618)), 1) if distance else 1


def _by_device(parts: list[Tensor]) -> list[Tensor]:
    """Vectors joined where they lie together: one copy from a device, not hundreds."""
    devices = dict.fromkeys(part.device for part in parts)
    return [torch.cat([part for part in parts if part.device == device]) for device in devices]
