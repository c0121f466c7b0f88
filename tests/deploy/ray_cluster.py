"""`python -m tests.deploy.ray_cluster DIRECTORY FILE`: Ray on loopback alone, with the applications of a file.

Prints a line when they run. Ends when its standard input does, and takes along everything that belongs to it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from unittest import mock

import ray
import yaml
from ray import serve


def application(described):
    """An application as `serve run` makes it of its part of the file."""
    module, _, name = described["import_path"].partition(":")
    built = getattr(importlib.import_module(module), name)(described["args"])
    return serve.RunTarget(built, name=described["name"], route_prefix=described["route_prefix"])


def main():
    directory, file = sys.argv[1:]
    config = yaml.safe_load(Path(file).read_text())
    # Whatever it could keep for another cluster stays small; `local` never joins one that runs already.
    # Ray would replace the address of loopback by one that other machines reach.
    with mock.patch("ray._private.services.resolve_ip_for_localhost", lambda host: host):
        ray.init(
            "local",
            num_cpus=2,
            num_gpus=0,
            object_store_memory=80_000_000,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=directory,
        )
    try:
        serve.start(proxy_location=config["proxy_location"])
        serve.run_many([application(described) for described in config["applications"]])
        print("running", flush=True)
        sys.stdin.read()
        serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
