"""The status of a service, and how it is shown."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading

import pytest
import structlog
from structlog.testing import capture_logs

from specpair.v1 import common_pb2
from specpair_runtime.serving import ServiceStatus, configure_logs
from specpair_runtime.serving.progress import shown


def test_fill():
    """A ModelInfo gets the phase, the progress within it, and the detail; progress stays within 0 and 1."""
    status = ServiceStatus()
    info = common_pb2.ModelInfo(model="kept")
    status.set(common_pb2.PHASE_WARMING_UP, 0.5, "step 3")
    status.fill(info)
    assert info == common_pb2.ModelInfo(model="kept", phase=common_pb2.PHASE_WARMING_UP, progress=0.5, detail="step 3")
    status.advance(7)
    assert status.snapshot.progress == 1
    assert status.snapshot.phase_name == "warming up"


@pytest.mark.parametrize("last", [common_pb2.PHASE_DRAINING, common_pb2.PHASE_FAILED])
def test_last_phases_are_final(last):
    """A service that drains or failed cannot become ready any more."""
    status = ServiceStatus()
    status.set(last)
    status.set(common_pb2.PHASE_READY)
    status.advance(0.5)
    assert status.snapshot.phase == last


def test_listeners_see_one_order():
    """All listeners see all changes, in the same order, whichever threads make them, until they are forgotten."""
    status = ServiceStatus()
    first, second = [], []
    status.listen(first.append)
    forget = status.listen(second.append)

    def change(name):
        for step in range(200):
            status.set(common_pb2.PHASE_LOADING, step / 200, name)

    threads = [threading.Thread(target=change, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first == second
    assert len(first) == 601
    forget()
    status.set(common_pb2.PHASE_READY)
    assert first[-1].phase == common_pb2.PHASE_READY
    assert len(second) == 601


def test_progress_off_a_terminal():
    """Off a terminal there is a line per phase and per tenth of it, and no more."""
    status = ServiceStatus()
    with capture_logs() as logs, shown(status, terminal=False):
        for phase in (common_pb2.PHASE_LOADING, common_pb2.PHASE_COMPILING):
            status.set(phase)
            for step in range(1001):
                status.advance(step / 1000)
        status.set(common_pb2.PHASE_READY)
    assert [line["event"] for line in logs] == ["loading"] * 11 + ["compiling"] * 11


def test_progress_on_a_terminal(monkeypatch):
    """On a terminal there is one line that shows phase, detail and percentage, and ends when the service is ready."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    status = ServiceStatus()
    with shown(status, terminal=True):
        status.set(common_pb2.PHASE_COMPILING, 0.4, "prefill")
        status.advance(0.5)
        status.set(common_pb2.PHASE_READY)
        assert sys.stderr is screen
    assert "compiling prefill" in screen.getvalue()


@pytest.fixture
def logs():
    """Undoes what `configure_logs` does to the process."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.mark.usefixtures("logs")
def test_json_logs(capsys):
    """structlog and stdlib loggers both write JSON lines to stderr with level, time and the call's context."""
    configure_logs("json", "info")
    structlog.contextvars.bind_contextvars(request_id="r-1")
    try:
        structlog.get_logger("ours").info("hello", rounds=3)
        structlog.get_logger("ours").debug("not shown")
        logging.getLogger("theirs").warning("care: %s", "x")
        try:
            raise ValueError("why")
        except ValueError:
            structlog.get_logger("ours").exception("failed")
    finally:
        structlog.contextvars.clear_contextvars()
    ours, theirs, failed = map(json.loads, capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["rounds"], ours["logger"], ours["level"]) == ("hello", 3, "ours", "info")
    assert (theirs["event"], theirs["logger"], theirs["level"]) == ("care: x", "theirs", "warning")
    assert ours["request_id"] == theirs["request_id"] == "r-1"
    assert ours["timestamp"].endswith("Z")
    assert "ValueError: why" in failed["exception"]


@pytest.mark.usefixtures("logs")
def test_console_tracebacks_hide_variables(capsys):
    """A traceback on the console has no values of local variables, which may be prompts."""
    configure_logs("console", "info")

    def handle(prompt):
        raise ValueError("why")

    try:
        handle("s3" + "cret")
    except ValueError:
        structlog.get_logger("ours").exception("failed")
    text = capsys.readouterr().err
    assert "ValueError: why" in text
    assert "s3cret" not in text
