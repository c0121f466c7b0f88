"""Laws of waiting for services that start, and of what is shown meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from rich.console import Console

from specpair import DeadlineError, UnauthenticatedError, UnavailableError, phases
from specpair.messages import ModelInfo, Phase
from specpair.v1 import common_pb2, target_pb2, target_pb2_grpc
from specpair.waiting import Sight, Waited, until_ready

from .commanding import command
from .loopback import FINGERPRINT, TargetServicer, serving


class Starting:
    """A service that is seen in one state after the other; the last one stays."""

    def __init__(self, *states):
        self.states = list(states)

    async def healthy(self, within=None):
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        self.now = state
        return state.phase is Phase.READY

    async def info(self, within=None):
        if self.now.detail == "secret":
            raise UnauthenticatedError("no token")
        return self.now


LOADING = ModelInfo(phase=Phase.LOADING, progress=0.5, detail="reading")
WARM = ModelInfo(phase=Phase.WARMING_UP, progress=0.1)
READY = ModelInfo(phase=Phase.READY, progress=1.0)
GONE = UnavailableError("connection refused")


def seen(*services, within=None):
    """What `until_ready` shows of (role, states) each, until it returns."""
    shown = []
    waited = [Waited(role, f"a{i}", Starting(*states)) for i, (role, *states) in enumerate(services)]
    asyncio.run(until_ready(waited, lambda one, sight: shown.append((one.address, str(sight))), within=within))
    return shown


def test_phases_are_shown_until_it_is_ready():
    """One sight after the other, each with its phase."""
    assert seen(("target", LOADING, WARM, READY)) == [("a0", "loading reading"), ("a0", "warming up"), ("a0", "ready")]


def test_without_a_time_only_a_starting_target_is_waited_for():
    """One that cannot be reached, drains or has failed is the caller's to find out; a draft holds nobody up."""
    for state in (GONE, ModelInfo(phase=Phase.DRAINING), ModelInfo(phase=Phase.FAILED, detail="no memory")):
        assert len(seen(("target", state))) == 1
    assert len(seen(("target", READY), ("draft", LOADING))) == 2
    assert seen(("target", LOADING, READY), ("draft", GONE))[-2:] == [
        ("a0", "ready"),
        ("a1", "not reachable: connection refused"),
    ]


def test_with_a_time_all_are_waited_for():
    """Also for what cannot be reached yet; of several targets one is enough."""
    shown = seen(("target", GONE, LOADING, READY), ("target", GONE), ("draft", GONE, GONE, LOADING, READY), within=30)
    assert shown[-1] == ("a2", "ready")
    with pytest.raises(DeadlineError, match=r"not ready within 0\.3 s: target a0: loading reading"):
        seen(("target", LOADING), within=0.3)


def test_each_may_be_waited_for():
    """Also the second one of several targets."""
    waited = [Waited("target", name, Starting(*states)) for name, states in {"a": [READY], "b": [GONE, READY]}.items()]
    shown = []
    asyncio.run(until_ready(waited, lambda one, sight: shown.append((one.address, str(sight))), within=30, each=True))
    assert shown[-1] == ("b", "ready")


def test_what_waiting_does_not_change_is_raised():
    """A certificate that is not trusted, at once."""
    with pytest.raises(UnauthenticatedError):
        seen(("target", UnauthenticatedError("not from a CA that this client trusts")), within=30)


def test_a_service_that_says_nothing_without_a_token():
    """Its health is enough to wait for it."""
    secret = ModelInfo(phase=Phase.LOADING, detail="secret")
    assert seen(("target", secret, READY), within=30) == [("a0", "not serving"), ("a0", "ready")]


def showing(monkeypatch, *sights, terminal):
    """What is written of sights of one service."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None, _environ={})
    monkeypatch.setattr(phases, "stderr", console)
    with phases.showing() as show:
        for sight in sights:
            show(Waited("target", "a", None), sight)
    return file.getvalue()


def test_an_address_is_shown_as_it_is(monkeypatch):
    """Brackets are no markup, neither those of IPv6 nor what a service says that it is doing."""
    written = showing(monkeypatch, Sight(Phase.LOADING, 0.5, "[fe80::1]:1 [/x] \x1b[2J"), terminal=True)
    assert "target a: loading [fe80::1]:1 [/x] ␛[2J" in written


def test_lines_where_nobody_watches(monkeypatch):
    """One per change of what is being done, not per step; nothing of a service that is ready from the start."""
    steps = [Sight(Phase.LOADING, i / 10, "m") for i in range(10)]
    written = showing(monkeypatch, Sight(None, detail="starting"), *steps, Sight(Phase.READY), terminal=False)
    assert written == "target a: starting\ntarget a: loading m\ntarget a: ready\n"
    assert showing(monkeypatch, Sight(Phase.READY), Sight(Phase.READY), terminal=False) == ""


def test_bars_on_a_terminal(monkeypatch):
    """A bar per phase, the last one as far as the service says; they are gone at the end."""
    monkeypatch.setattr("specpair.rendering.PLAIN", False)
    sights = [Sight(Phase.LOADING, 0.4, "m"), Sight(Phase.COMPILING, 0.0), Sight(Phase.WARMING_UP, 0.25)]
    written = showing(monkeypatch, *sights, terminal=True)
    frames = re.split(r"\x1b\[\d*A", written)
    last = next(frame for frame in reversed(frames) if "warming up" in frame)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last)
    assert re.search(r"loading m .* 100%.*compiling .* 100%.*warming up .* 25%", shown, re.DOTALL)
    assert written.rstrip("\x1b[?25h").endswith("\x1b[2K")  # the line is wiped
    assert showing(monkeypatch, Sight(Phase.READY), terminal=True).strip("\x1b[?25hl\r\n") == ""


@contextlib.contextmanager
def loading(answers):
    """A target over gRPC that is not serving before it has been asked so often what it runs."""

    class Loading(TargetServicer):
        asked = 0

        def GetModelInfo(self, request, context):
            self.asked += 1
            phase = common_pb2.PHASE_LOADING if self.asked <= answers else common_pb2.PHASE_READY
            info = common_pb2.ModelInfo(
                model="target", phase=phase, progress=self.asked / 10, fingerprint=FINGERPRINT, verify_width=8
            )
            return target_pb2.TargetServiceGetModelInfoResponse(info=info)

    servicer = Loading()
    server = grpc.server(ThreadPoolExecutor(4))
    target_pb2_grpc.add_TargetServiceServicer_to_server(servicer, server)
    check = grpc.unary_unary_rpc_method_handler(
        lambda request, context: b"\x08\x01" if servicer.asked >= answers else b"\x08\x02"
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0.2).wait()


@pytest.mark.parametrize("name", ["generate", "info", "health", "explain"])
def test_commands_wait(name):
    """With --wait a command goes on when the service is ready, and says on stderr what it waits for."""
    arguments = {"generate": ["x", "--draft=none"], "info": ["--draft=none"], "explain": ["x", "--proposal-ids=1"]}
    with loading(3) as address:
        done = command(name, *arguments.get(name, []), f"--target={address}", "--wait", "60", "--json")
    assert done.returncode == 0
    assert done.stderr == f"target {address}: loading\ntarget {address}: ready\n"
    assert json.loads(done.stdout)


def test_health_waits_for_each_of_several_targets():
    """It goes on to ask all of them, so one that is ready before the others does not end the wait."""
    with serving(TargetServicer()) as ready, loading(3) as address:
        done = command("health", f"--target={ready},{address}", "--wait", "60")
    assert (done.returncode, done.stdout) == (0, f"target {ready},{address}: serving\n")


def test_health_waits_for_a_draft_alone():
    """A draft that is not there is waited for, by itself."""
    done = command("health", "--draft=127.0.0.1:1", "--wait", "0.5")
    assert (done.returncode, done.stdout) == (1, "draft 127.0.0.1:1: not serving\n")
    waited, missing, asked = done.stderr.splitlines()
    assert waited.startswith("draft 127.0.0.1:1: not reachable: ")
    assert missing.startswith("not ready within 0.5 s: draft 127.0.0.1:1: not reachable: ")
    assert asked.startswith("draft 127.0.0.1:1: ")


def test_no_time_is_no_wait():
    """With --wait 0 a command goes on at once, whoever is there or not."""
    with serving(TargetServicer()) as address:
        done = command("generate", "x", f"--target={address}", "--draft=none", "--wait", "0", "--max-new-tokens", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_health_waits_in_vain():
    """Exit code 1, as without waiting; another command has run out of time."""
    with loading(10**6) as address:
        done = command("health", f"--target={address}", "--wait", "0.5", "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout) == {"target": {"address": address, "serving": False}}
        done = command("info", f"--target={address}", "--draft=none", "--wait", "0.5")
        assert done.returncode == 4
        assert done.stderr.splitlines()[-1].startswith("error: not ready within 0.5 s: ")


def test_without_wait_info_shows_where_it_stands():
    """Nobody is held up: the phase is what was asked for."""
    with loading(10**6) as address:
        done = command("info", f"--target={address}", "--draft=none", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["target"]["phase"] == "loading"
