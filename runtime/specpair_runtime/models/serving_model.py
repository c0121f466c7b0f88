"""From a configuration to a model that is loaded, compiled and warm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from specpair.v1.common_pb2 import PHASE_COMPILING, PHASE_LOADING, PHASE_WARMING_UP
from specpair_runtime.models.compile_cache import keep_compiled
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.lean import prepare
from specpair_runtime.models.loading import LoadedModel, check_length, load_model
from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.models.self_check import check_slot_cache
from specpair_runtime.models.warmup import CompileCounter, warm_up
from specpair_runtime.serving import ServiceStatus

__all__ = ["ServingModel", "load_serving_model"]


@dataclass(frozen=True)
class ServingModel:
    """A loaded model and its runner; how many graphs were compiled since it was ready, and the rows per step it is for.

    `lean` is whether steps run in the lean decoder.
    """

    loaded: LoadedModel
    runner: ModelRunner
    recompilations: CompileCounter
    widths: tuple[int, ...]
    lean: bool


def load_serving_model(
    config: ModelConfig,
    widths: Sequence[int],
    status: ServiceStatus,
    choose: Callable[[ModelRunner], Sequence[int]] | None = None,
) -> ServingModel:
    """Loads, compiles and warms up, telling `status` how far it is.

    `widths` are the rows per step that will be used; each slot has room to pad the widest of them. `choose` picks those
    to warm up for among them, once the model is loaded; None takes all. Raises ModelLoadError.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    status.set(PHASE_LOADING, 0.0, f"loading {config.model}")
    loaded = load_model(config.load_options)
    max_length = min(config.max_length, loaded.max_positions or config.max_length)
    check_length(loaded.model.config, max_length)
    compile_ = config.compile_options(loaded.model.device.type)
    if compile_ is not None:
        keep_compiled(config.compile_cache)
    lean = None
    if config.lean:
        # The narrowest steps are the most frequent ones. A compiler packs weights itself.
        rows = max(widths) if choose is not None else min(widths)
        lean = prepare(loaded.model, positions=max_length, rows=rows, pack=compile_ is None)
    runner = ModelRunner(
        loaded.model,
        slots=config.slots,
        max_length=max_length,
        scratch=max(widths),
        vocabulary=loaded.fingerprint.vocabulary_size,
        compile_=compile_,
        sdpa_backend=config.sdpa_backend,
        deterministic=config.deterministic,
        lean=lean,
    )
    check_slot_cache(runner)
    phase = PHASE_COMPILING if runner.compiled else PHASE_WARMING_UP
    status.set(phase, 0.0, f"{'compiling' if runner.compiled else 'warming up'} {config.model}")
    recompilations = CompileCounter()
    used = tuple(choose(runner) if choose is not None else widths)
    warm_up(runner, used, status.advance)
    recompilations.reset()
    return ServingModel(loaded, runner, recompilations, used, lean is not None)
