"""The applications: `import_path: specpair_ray.app:target` and `specpair_ray.app:draft`."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from specpair_ray.options import Options, Role
from specpair_ray.replica import Replica
from specpair_ray.scaling import BySlots

__all__ = ["draft", "target"]

# Seconds for Serve's own part in ending a replica, behind the service's grace.
_SHUTDOWN = 15.0


def target(args: dict[str, Any]) -> Application:
    """Replicas of the target service; `args` are `Options`."""
    return _application("target", Options.model_validate(args))


def draft(args: dict[str, Any]) -> Application:
    """Replicas of the draft service; `args` are `Options`."""
    return _application("draft", Options.model_validate(args))


def _application(role: Role, options: Options) -> Application:
    fewest, most = options.replicas
    scaling = AutoscalingConfig(
        min_replicas=fewest,
        max_replicas=most,
        upscale_delay_s=options.upscale_delay,
        downscale_delay_s=options.downscale_delay,
        policy=AutoscalingPolicy(policy_function=BySlots, policy_kwargs={"use": options.use}),
    )
    deployed = serve.deployment(
        Replica,
        name=role,
        autoscaling_config=scaling,
        ray_actor_options={
            "num_cpus": options.cpus,
            "num_gpus": options.gpus,
            # Processes of several replicas share cores: waiting threads must not spin.
            "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "passive"}},
        },
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=options.grace + _SHUTDOWN,
    )
    return deployed.bind(role, options)
