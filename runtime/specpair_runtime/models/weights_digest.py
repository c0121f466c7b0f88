"""A digest that tells the weights of two models of one shape apart."""

from __future__ import annotations

import hashlib
from itertools import chain

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

__all__ = ["weights_digest"]

# Numbers looked at per tensor: training moves all of them, and to read whole checkpoints would take minutes.
_SAMPLE = 16


def weights_digest(model: PreTrainedModel) -> str:
    """A SHA-256 in hex over the first numbers of each parameter and buffer, in their order and with their names.

    Of tensors that processes share it takes this one's part. Those of packed formats that cannot be read number by
    number count by name and shape.
    """
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        held = tensor.data.to_local() if isinstance(tensor.data, DTensor) else tensor.data
        if type(held) is torch.Tensor and held.layout is torch.strided and not held.is_meta:
            digest.update(held.reshape(-1)[:_SAMPLE].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
