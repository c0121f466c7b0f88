"""From a configuration to a model that is loaded, compiled and warm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specpair.errors import ModelLoadError
from specpair.v1.common_pb2 import PHASE_COMPILING, PHASE_LOADING, PHASE_WARMING_UP
from specpair_runtime.models.compile_cache import keep_compiled
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.lean import prepare
from specpair_runtime.models.loading import LoadedModel, check_length, check_split, load_model
from specpair_runtime.models.mirror import LeadingRunner, follow
from specpair_runtime.models.parallel import rank_device
from specpair_runtime.models.ranks import Ranks
from specpair_runtime.models.runner import CompileOptions, ModelRunner
from specpair_runtime.models.self_check import check_slot_cache
from specpair_runtime.models.warmup import CompileCounter, warm_up
from specpair_runtime.serving import ServiceStatus

__all__ = ["ServingModel", "follow_serving_model", "load_serving_model"]


@dataclass(frozen=True)
class ServingModel:
    """A loaded model and its runner; how many graphs were compiled since it was ready, and the rows per step it is for.

    `lean` is whether steps run in the lean decoder; `processes` share the weights.
    """

    loaded: LoadedModel
    runner: ModelRunner
    recompilations: CompileCounter
    widths: tuple[int, ...]
    lean: bool
    processes: int = 1


def load_serving_model(
    config: ModelConfig,
    widths: Sequence[int],
    status: ServiceStatus,
    choose: Callable[[ModelRunner], Sequence[int]] | None = None,
    ranks: Ranks | None = None,
) -> ServingModel:
    """Loads, compiles and warms up, telling `status` how far it is.

    `widths` are the rows per step that will be used; each slot has room to pad the widest of them. `choose` picks those
    to warm up for among them, once the model is loaded; None takes all. `ranks`, of which this process is the first,
    share the model: the others call `follow_serving_model`. Raises ModelLoadError.
    """
    loaded = _load(config, status, ranks)
    compile_ = _compile_options(config, loaded)
    if compile_ is not None:
        keep_compiled(config.compile_cache)
    lean = None
    if config.lean and loaded.whole:
        # The narrowest steps are the most frequent ones. A compiler packs weights itself.
        rows = max(widths) if choose is not None else min(widths)
        lean = prepare(loaded.model, positions=_max_length(config, loaded), rows=rows, pack=compile_ is None)
    options = {**_runner_options(config, widths, loaded), "compile_": compile_, "lean": lean}
    runner = ModelRunner(loaded.model, **options) if ranks is None else LeadingRunner(ranks, loaded.model, **options)
    check_slot_cache(runner)
    phase = PHASE_COMPILING if runner.compiled else PHASE_WARMING_UP
    status.set(phase, 0.0, f"{'compiling' if runner.compiled else 'warming up'} {config.model}")
    recompilations = CompileCounter()
    used = tuple(choose(runner) if choose is not None else widths)
    warm_up(runner, used, status.advance)
    recompilations.reset()
    return ServingModel(loaded, runner, recompilations, used, lean is not None, 1 if ranks is None else ranks.size)


def follow_serving_model(config: ModelConfig, widths: Sequence[int], ranks: Ranks) -> None:
    """Loads this process's part of a model that rank 0 serves and computes along until rank 0 ends that.

    The arguments are those of rank 0's `load_serving_model`. Raises ModelLoadError.
    """
    loaded = _load(config, ServiceStatus(), ranks)
    follow(ModelRunner(loaded.model, **_runner_options(config, widths, loaded)), ranks)


def _load(config: ModelConfig, status: ServiceStatus, ranks: Ranks | None) -> LoadedModel:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    status.set(PHASE_LOADING, 0.0, f"loading {config.model}")
    options = config.load_options
    if ranks is None:
        return _checked(config, load_model(options))
    if config.compile == "on":
        raise ModelLoadError("is not for a model that processes share", field="compile")
    check_split(options, ranks)
    ranks.form(rank_device(options, ranks), status.fail)
    with ranks.all_or_none():
        return _checked(config, load_model(options, ranks))


def _checked(config: ModelConfig, loaded: LoadedModel) -> LoadedModel:
    check_length(loaded.model.config, _max_length(config, loaded))
    return loaded


def _max_length(config: ModelConfig, loaded: LoadedModel) -> int:
    return min(config.max_length, loaded.max_positions or config.max_length)


def _compile_options(config: ModelConfig, loaded: LoadedModel) -> CompileOptions | None:
    if loaded.whole:
        return config.compile_options(loaded.model.device.type)
    # Copies between devices and sums over processes would be parts of the graphs.
    if config.compile == "on":
        raise ModelLoadError("is not for a model that is spread over devices", field="compile")
    return None


def _runner_options(config: ModelConfig, widths: Sequence[int], loaded: LoadedModel) -> dict[str, Any]:
    """What all processes that share a model have in common."""
    return {
        "slots": config.slots,
        "max_length": _max_length(config, loaded),
        "scratch": max(widths),
        "vocabulary": loaded.fingerprint.vocabulary_size,
        "sdpa_backend": config.sdpa_backend,
        "deterministic": config.deterministic,
    }
