"""Linear layers with quantized weights on a CPU.

Three formats that `options` calls int8wo, int4wo and int8dyn. The first two are torchao's numbers under the kernels
that torch has for them; the third also quantizes what comes in, row by row, and multiplies integers. In each of them a
row's result depends on that row alone, so it does not matter which proposals or sessions share a step.
docs/quantization.md says what they cost and how true they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specpair.errors import ModelLoadError

__all__ = ["INT4_GROUP", "DynamicInt8Linear", "Int4Linear", "Int8Linear", "quantize_linears"]

INT4_GROUP = 64
"""Weights of int4wo that share a scale and a zero point."""
# The 4-bit kernel computes so many outputs at a time.
_INT4_OUTPUTS = 16
# What the packing of int8dyn is made for.
_FEW_ROWS = 8


class Int8Linear(nn.Module):
    """Weights in int8 with a scale for each output, inputs as they are (bf16)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` is [outputs, inputs] in bf16."""
        from torchao.quantization import Int8Tensor, PerRow

        super().__init__()
        self.out_features, self.in_features = weight.shape
        numbers = Int8Tensor.from_hp(weight, PerRow())
        self.weight = nn.Buffer(numbers.qdata)
        self.scales = nn.Buffer(numbers.scale.flatten().to(weight.dtype))
        self.bias = None if bias is None else nn.Buffer(bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        rows = inputs.reshape(-1, self.in_features)
        outputs = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)
        return _finish(outputs, self.bias, inputs)


class Int4Linear(nn.Module):
    """Weights in 4 bits with a scale and a zero point for each `INT4_GROUP` of them, inputs as they are (bf16)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` is [outputs, inputs] in bf16. Raises ValueError for sizes that cannot be packed."""
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

        super().__init__()
        self.out_features, self.in_features = weight.shape
        if self.in_features % INT4_GROUP or self.out_features % _INT4_OUTPUTS:
            raise ValueError(f"inputs come in groups of {INT4_GROUP}, outputs in groups of {_INT4_OUTPUTS}")
        numbers = Int4OpaqueTensor.from_hp(weight, [1, INT4_GROUP])
        self.weight = nn.Buffer(numbers.qdata)
        self.scales_and_zeros = nn.Buffer(numbers.scale_and_zero)
        self.bias = None if bias is None else nn.Buffer(bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        rows = inputs.reshape(-1, self.in_features)
        outputs = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, INT4_GROUP, self.scales_and_zeros)
        return _finish(outputs, self.bias, inputs)


class DynamicInt8Linear(nn.Module):
    """Weights in int8 with a scale for each output, inputs in int8 with a scale for each row (W8A8).

    The products are sums of integers, which are exact in any order: the same row has the same bits in every step, of
    any width and any number of sessions. Scales are symmetric, one for each row and output (Dettmers et al. 2022,
    arXiv:2208.07339, vector-wise quantization), without that paper's treatment of outliers.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` is [outputs, inputs] in any floating-point format."""
        super().__init__()
        scales = _scales(weight.float(), 127)
        self._keep(torch.round(weight.float() / scales).to(torch.int8), scales.flatten(), bias)

    @classmethod
    def joined(cls, layers: Sequence[DynamicInt8Linear]) -> DynamicInt8Linear:
        """Layers over the same input as one, their outputs side by side; the same bits as each of them alone."""
        one = cls.__new__(cls)
        nn.Module.__init__(one)
        # As it was packed, a weight unpacks to [inputs, outputs].
        integers = torch.cat([layer.weight.to_dense().T for layer in layers])
        # Zeros for those without a bias, which change no bit.
        biases = [layer.scales.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases)
        one._keep(integers, torch.cat([layer.scales for layer in layers]), bias)
        return one

    def _keep(self, integers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = integers.shape
        # Without VNNI two products of bytes are added up in 16 bits: inputs of 7 bits leave room for that.
        self._levels = 127 if torch.cpu._is_vnni_supported() else 63
        packed = torch.ops.onednn.qlinear_prepack(integers.contiguous(), [_FEW_ROWS, self.in_features])
        self.weight = nn.Buffer(packed)
        self.scales = nn.Buffer(scales)
        self.zeros = nn.Buffer(torch.zeros(self.out_features, dtype=torch.int32))
        self.bias = None if bias is None else nn.Buffer(bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        rows = inputs.reshape(-1, self.in_features).float()
        scales = _scales(rows, self._levels)
        # Unsigned with a zero in the middle: signed inputs fall back to a reference kernel without AMX.
        zero = self._levels + 1
        integers = (rows / scales).round_().add_(zero).to(torch.uint8)
        multiply = _opaque_product if torch.compiler.is_compiling() else _product
        outputs = multiply(integers, zero, self.weight, self.scales, self.zeros)
        return _finish(outputs.mul_(scales), self.bias, inputs)


_LAYERS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], nn.Module]] = {
    "int8wo": Int8Linear,
    "int4wo": Int4Linear,
    "int8dyn": DynamicInt8Linear,
}


@torch.no_grad()
def quantize_linears(model: PreTrainedModel, name: str) -> None:
    """Replaces the linear layers of a model on a CPU by those of int8wo, int4wo or int8dyn; the head stays.

    Raises ModelLoadError naming `quantization` for a model that the format does not fit.
    """
    head = model.get_output_embeddings()
    replaced = 0
    for path, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            if not isinstance(layer, nn.Linear | Conv1D) or layer is head:
                continue
            # GPT-2 keeps its weights the other way round.
            weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T.contiguous()
            try:
                setattr(module, child, _LAYERS[name](weight.detach(), layer.bias))
            except (ImportError, RuntimeError, ValueError) as error:
                where = f"{path}.{child} of {list(weight.shape)}"
                raise ModelLoadError(f"{name} does not fit {where}: {error}", field="quantization") from error
            replaced += 1
    if not replaced:
        raise ModelLoadError(f"{type(model).__name__} has no linear layers for {name}", field="quantization")


def _scales(rows: torch.Tensor, levels: int) -> torch.Tensor:
    """What the largest magnitude of each row is divided by to become `levels`, [rows, 1]; never 0."""
    return rows.abs().amax(dim=-1, keepdim=True).div_(levels).clamp_(min=torch.finfo(torch.float32).tiny)


def _product(
    integers: torch.Tensor, zero: int, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """(integers - zero) @ (weight * scales).T in fp32, [rows, outputs]; `weight` as oneDNN packs it."""
    outputs: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        integers, 1.0, zero, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return outputs


# inductor has an own idea of this operation, which weights that are no constants of the graph do not fit.
_opaque_product = torch.library.custom_op("specpair::int8_product", _product, mutates_args=())


@_opaque_product.register_fake
def _(
    integers: torch.Tensor, zero: int, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    return integers.new_empty((integers.shape[0], scales.shape[0]), dtype=torch.float32)


def _finish(outputs: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    if bias is not None:
        outputs = outputs + bias
    return outputs.to(inputs.dtype).view(*inputs.shape[:-1], outputs.shape[-1])
