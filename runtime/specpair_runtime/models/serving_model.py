"""From a configuration to a model that is loaded, compiled and warm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specpair.v1.common_pb2 import PHASE_COMPILING, PHASE_LOADING, PHASE_WARMING_UP
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.loading import LoadedModel, check_length, load_model
from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.models.self_check import check_slot_cache
from specpair_runtime.models.warmup import CompileCounter, warm_up
from specpair_runtime.serving import ServiceStatus

__all__ = ["ServingModel", "load_serving_model"]


@dataclass(frozen=True)
class ServingModel:
    """A loaded model, its runner, and the count of what was compiled since it was ready."""

    loaded: LoadedModel
    runner: ModelRunner
    recompilations: CompileCounter


def load_serving_model(config: ModelConfig, widths: Sequence[int], status: ServiceStatus) -> ServingModel:
    """Loads, compiles and warms up, telling `status` how far it is.

    `widths` are the rows per step that will be used; each slot has room to pad the widest of them. Raises
    ModelLoadError.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    status.set(PHASE_LOADING, 0.0, f"loading {config.model}")
    loaded = load_model(config.load_options)
    max_length = min(config.max_length, loaded.max_positions or config.max_length)
    check_length(loaded.model.config, max_length)
    runner = ModelRunner(
        loaded.model,
        slots=config.slots,
        max_length=max_length,
        scratch=max(widths),
        vocabulary=loaded.fingerprint.vocabulary_size,
        compile_=config.compile_options(loaded.model.device.type),
        sdpa_backend=config.sdpa_backend,
        deterministic=config.deterministic,
    )
    check_slot_cache(runner)
    phase = PHASE_COMPILING if runner.compiled else PHASE_WARMING_UP
    status.set(phase, 0.0, f"{'compiling' if runner.compiled else 'warming up'} {config.model}")
    recompilations = CompileCounter()
    warm_up(runner, widths, status.advance)
    recompilations.reset()
    return ServingModel(loaded, runner, recompilations)
