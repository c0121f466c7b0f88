"""Laws of deploy/ray that need no Ray: ports, options, processes that end with another one, how many replicas."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from specpair import Credentials
from specpair_draft.config import DraftConfig
from specpair_ray.attached import command
from specpair_ray.options import Options
from specpair_ray.ports import Claim
from specpair_ray.scaling import BySlots
from specpair_target.config import TargetConfig

from ..e2e.processes import wait_for
from .files import DEPLOY

HOST = "127.0.0.1"


def listening(count):
    """Sockets that listen on free ports."""
    return [socket.create_server((HOST, 0)) for _ in range(count)]


def port_of(server):
    """Where it listens."""
    return server.getsockname()[1]


def metrics(**counts):
    """What Serve hands to a policy: `counts` are by replica."""
    aggregated = {name: dict(enumerate(values)) for name, values in counts.items()}
    return SimpleNamespace(aggregated_metrics=aggregated, target_num_replicas=3)


class TestPorts:
    """Which port a replica takes."""

    def test_the_first_that_is_free(self):
        """Ports at which somebody listens are passed over, in order."""
        servers = listening(3)
        ports = [port_of(server) for server in servers]
        servers[1].close()
        servers[2].close()
        claim = Claim(HOST, ports)
        assert claim.address == f"{HOST}:{ports[1]}"
        claim.release()
        servers[0].close()

    def test_two_never_take_the_same(self):
        """A port that was claimed belongs to nobody else until it is released, though nothing listens there yet."""
        servers = listening(2)
        ports = [port_of(server) for server in servers]
        for server in servers:
            server.close()
        first, second = Claim(HOST, ports), Claim(HOST, ports)
        assert [first.address, second.address] == [f"{HOST}:{port}" for port in ports]
        with pytest.raises(RuntimeError, match="no port is free"):
            Claim(HOST, ports)
        first.release()
        third = Claim(HOST, ports)
        assert third.address == first.address
        second.release()
        third.release()

    def test_whoever_is_killed_leaves_nothing(self):
        """A claim ends with its process, however that ends."""
        server = listening(1)[0]
        port = port_of(server)
        server.close()
        code = f"import specpair_ray.ports as p; c = p.Claim('{HOST}', [{port}]); print('.', flush=True); input()"
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process:
            assert process.stdout.readline() == b".\n"
            with pytest.raises(RuntimeError):
                Claim(HOST, [port])
            process.kill()
        claim = Claim(HOST, [port])
        claim.release()


class TestAttached:
    """Processes that end with the one that started them."""

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_nobody_outlives_its_parent(self, number):
        """However the parent ends, the kernel ends the module that it runs."""
        code = (
            "import subprocess, sys, time\n"
            "from specpair_ray.attached import command\n"
            "print(subprocess.Popen(command('http.server', '--bind=127.0.0.1', '0')).pid, flush=True)\n"
            "time.sleep(600)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as parent:
            child = psutil.Process(int(parent.stdout.readline()))
            wait_for(lambda: "http.server" in child.cmdline(), 20, "the module runs")
            parent.send_signal(number)
            parent.wait(20)
            gone, _ = psutil.wait_procs([child], 20)
        assert gone == [child]

    def test_it_becomes_the_module(self):
        """The module gets the flags, and its exit status is that of the process."""
        # `timeit` is a module that takes code as an argument, and its status is 1 if that fails.
        code = "import sys; print(sys.argv[1:]); raise Exception"
        ran = subprocess.run(command("timeit", "-n1", "-r1", code), capture_output=True, text=True, check=False)
        assert ran.stdout == f"{['-n1', '-r1', code]}\n"
        assert ran.returncode == 1

    def test_a_parent_that_has_gone_already(self):
        """Nothing begins for a process that is not there any more."""
        given = [part if part != str(os.getpid()) else "1" for part in command("this")]
        ran = subprocess.run(given, capture_output=True, text=True, check=False)
        assert (ran.stdout, ran.stderr, ran.returncode) == ("", "the parent has ended already\n", 1)


class TestOptions:
    """What applications can be told."""

    @pytest.mark.parametrize(
        ("wrong", "field"),
        [
            ({"ports": "50058-50051"}, "ports"),
            ({"ports": "0"}, "ports"),
            ({"ports": "1-70000"}, "ports"),
            ({"ports": "some"}, "ports"),
            ({"ports": "-"}, "ports"),
            ({"flags": ["--listen=0.0.0.0:1"]}, "flags"),
            ({"flags": ["--grace", "3"]}, "flags"),
            ({"flags": ["--metrics-listen=127.0.0.1:9464"]}, "flags"),
            ({"metrics_listen": "9464"}, "metrics_listen"),
            ({"metrics_listen": ":9464"}, "metrics_listen"),
            ({"metrics_listen": "127.0.0.1:"}, "metrics_listen"),
            ({"metrics_listen": "127.0.0.1:9471-9464"}, "metrics_listen"),
            ({"replicas": [0, 1]}, "replicas"),
            ({"replicas": [2, 1]}, "replicas"),
            ({"use": 0}, "use"),
            ({"use": 1.1}, "use"),
            ({"port": "1"}, "port"),
        ],
    )
    def test_what_cannot_be(self, wrong, field):
        """Values that make no sense are refused before anything starts, by name."""
        with pytest.raises(ValidationError) as refused:
            Options.model_validate({"flags": [], "ports": "50051", **wrong})
        assert [problem["loc"][0] for problem in refused.value.errors()] == [field]

    def test_ports_and_credentials(self):
        """A range has both its ends; files become what the client takes, and none of them plain text."""
        options = Options(flags=[], ports="50051-50053", ca="/ca", token="/token")
        assert list(options.port_range) == [50051, 50052, 50053]
        assert list(Options(flags=[], ports="7").port_range) == [7]
        assert options.credentials == Credentials(ca="/ca", token=Path("/token"))
        assert Options(flags=[], ports="7").credentials == Credentials()

    def test_metrics(self):
        """An address and ports, of which replicas on one machine take different ones; none unless told."""
        listening_at = {"127.0.0.1:7": ("127.0.0.1", [7]), "[::1]:9464-9465": ("::1", [9464, 9465]), "": None}
        for listen, expected in listening_at.items():
            found = Options(flags=[], ports="50051", metrics_listen=listen).metrics
            assert (found and (found[0], list(found[1]))) == expected
        servers = listening(2)
        first, last = sorted(port_of(server) for server in servers)
        for server in servers:
            server.close()
        options = Options(flags=[], ports="50051", metrics_listen=f"{HOST}:{first}-{last}")
        claims = [Claim(*options.metrics) for _ in range(2)]
        assert len({claim.address for claim in claims}) == 2
        for claim in claims:
            claim.release()

    @pytest.mark.parametrize("name", ["demo", "gpu"])
    def test_files(self, name, monkeypatch):
        """Every application of the files is told what it takes, and flags that its service takes."""
        for variable in list(os.environ):
            if variable.startswith("SPECPAIR_"):
                monkeypatch.delenv(variable)
        file = yaml.safe_load((DEPLOY / f"ray/{name}.yaml").read_text())
        assert [application["name"] for application in file["applications"]] == ["target", "draft"]
        for application, config in zip(file["applications"], (TargetConfig, DraftConfig), strict=True):
            options = Options.model_validate(application["args"])
            assert config.parse(options.flags).slots > 0
            assert len(options.port_range) >= options.replicas[1] or options.gpus
            assert options.metrics is None or len(options.metrics[1]) >= len(options.port_range)
            assert application["import_path"] == f"specpair_ray.app:{application['name']}"


class TestScaling:
    """How many replicas there should be."""

    def test_enough_is_enough(self):
        """Half of two replicas' slots need one and a third at three of four, all of them need more than there are."""
        policy = BySlots(use=0.75)
        assert policy(metrics(slots=[8, 8], slots_in_use=[4, 4]))[0] == pytest.approx(8 / 6)
        assert policy(metrics(slots=[8, 8], slots_in_use=[8, 8]))[0] > 2
        assert policy(metrics(slots=[8, 8], slots_in_use=[0, 0]))[0] == 0

    @pytest.mark.parametrize("nothing", [{}, {"slots": []}, {"slots": [0, 0], "slots_in_use": [0, 0]}])
    def test_nothing_known(self, nothing):
        """While no replica has said anything, or none has slots, it stays as it is."""
        assert BySlots(use=0.75)(metrics(**nothing)) == (3, {})

    @given(
        st.integers(1, 64).flatmap(
            lambda slots: st.tuples(st.just(slots), st.lists(st.integers(0, slots), min_size=1, max_size=16))
        ),
        st.floats(0.1, 1.0),
    )
    def test_use_is_what_it_aims_at(self, replicas, use):
        """So many replicas have just the share of slots in use that is aimed at, if sessions stay as many."""
        slots, in_use = replicas
        wanted, kept = BySlots(use)(metrics(slots=[slots] * len(in_use), slots_in_use=in_use))
        assert wanted * slots * use == pytest.approx(sum(in_use))
        assert kept == {}
