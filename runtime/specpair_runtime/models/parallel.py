"""Which models can be split over processes, and how: transformers' tensor parallelism.

Projections into heads and into the MLP are split by their outputs, those back by their inputs, whose products are sums
over the processes (Shoeybi et al. 2019, arXiv:1909.08053). Each process has the KV of its own heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.distributed import DistributedConfig

from specpair.errors import ModelLoadError
from specpair_runtime.models.options import LoadOptions
from specpair_runtime.models.ranks import Ranks

__all__ = ["check_splittable", "distributed_config", "rank_device", "sum_in_order"]

# Projections whose outputs are heads, fused or not.
_INTO_HEADS = ("q_proj", "k_proj", "qkv_proj", "query_key_value")
# Styles of transformers that end in a sum over the processes.
_SUMMED = ("rowwise", "rowwise_rep", "rowwise_split_input")


def rank_device(options: LoadOptions, ranks: Ranks) -> torch.device:
    """What a process computes on: the GPU of its number on its machine, or the CPU where there is none.

    Raises ModelLoadError naming `device` when another one is asked for, or when there are too few.
    """
    cuda = torch.cuda.is_available()
    if options.device not in ("auto", "cuda" if cuda else "cpu"):
        advice = "; hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU" if cuda else ""
        raise ModelLoadError(
            f"{options.device!r} is not for {ranks.size} processes, which take one device each{advice}", field="device"
        )
    if not cuda:
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise ModelLoadError(
            f"{torch.cuda.device_count()} GPUs are visible, and rank {ranks.rank} needs another one", field="device"
        )
    return torch.device("cuda", ranks.local_rank)


def check_splittable(config: PreTrainedConfig, options: LoadOptions, size: int) -> None:
    """Raises ModelLoadError for what cannot be split over `size` processes, from the config alone."""
    if options.device_map != "one":
        raise ModelLoadError("is for one process; under torchrun each has its own device", field="device_map")
    if options.quantization != "none":
        raise ModelLoadError(
            f"{options.quantization} cannot be split over processes; one process with --device-map auto spreads "
            "quantized layers over GPUs",
            field="quantization",
        )
    kind = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        raise ModelLoadError(
            "a quantized checkpoint cannot be split over processes; --device-map auto spreads it", field="model"
        )
    text = config.get_text_config(decoder=True)
    plan = text.base_model_tp_plan or {}
    if not plan:
        raise ModelLoadError(f"{kind} has no plan for tensor parallelism in transformers", field="model")
    # On a CPU in fp32, products over shares of odd sizes have other bits in other places of a block.
    shared = ["intermediate_size"]
    if any(name.endswith(_INTO_HEADS) and style == "colwise" for name, style in plan.items()):
        shared += ["num_attention_heads", "num_key_value_heads"]
    for name in shared:
        count = getattr(text, name, None)
        if count is not None and count % size:
            raise ModelLoadError(f"its {name}, {count}, cannot be shared by {size} processes", field="model")


def distributed_config(config: PreTrainedConfig, size: int) -> Any:  # noqa: ANN401
    """How transformers splits a model over `size` processes while it loads it: by its own plan, but for the sums.

    Libraries add in the order in which parts go round, which depends on the shape of the tensor and on the place in it,
    so a token's bits would depend on its place in a block. The sum of two is the same in either order.
    """
    if size == 2:
        return DistributedConfig(tp_size=size)
    _register_ordered_sums()
    base = AutoModelForCausalLM._model_mapping[type(config)].base_model_prefix
    plan = config.get_text_config(decoder=True).base_model_tp_plan
    ordered = {f"{base}.{name}": _ordered(style) for name, style in plan.items() if style in _SUMMED}
    return DistributedConfig(tp_size=size, tp_plan=ordered)


def sum_in_order(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of all processes' parts, added in the order of their ranks; the same bits wherever an element stands."""
    parts = part.new_empty((group.size() * part.shape[0], *part.shape[1:]))
    dist.all_gather_into_tensor(parts, part.contiguous(), group=group)
    total, *others = parts.chunk(group.size())
    for other in others:
        total = total + other
    return total


def _ordered(style: str) -> str:
    return f"specpair_{style}"


def _register_ordered_sums() -> None:
    """Makes styles like transformers' own known to it, whose sums are in order."""
    from torch.distributed.tensor import Replicate, Shard
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel

    class OrderedRowwise(RowwiseParallel):
        def transform_output_post_forward(self, module: Any, output: torch.Tensor, mesh: Any) -> torch.Tensor:  # noqa: ANN401
            # The linear layer has multiplied its own part without its bias, which is everybody's.
            output = sum_in_order(output, mesh.get_group())
            return output if module.bias is None else output + module.bias.to_local()

    for style in _SUMMED:
        layouts = Replicate() if style == "rowwise_split_input" else Shard(-1)
        ALL_PARALLEL_STYLES.register(_ordered(style), OrderedRowwise(input_layouts=layouts))
