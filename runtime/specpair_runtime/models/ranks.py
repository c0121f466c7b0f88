"""The processes that torchrun started to share one model, as each of them sees the others.

Rank 0 serves and the others compute along. Besides the group that the model computes in, which torch or transformers
use, there are two over gloo on the CPU. In one of them rank 0 says what everybody runs next; there the others may wait
for days. In the other nobody says anything before the end: a process that dies has its connections closed by the
system, and whoever waits for its goodbye knows at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import structlog
import torch
import torch.distributed as dist
from torch.nn import functional

from specpair.errors import ModelLoadError, UnavailableError

__all__ = ["Ranks"]

# For sums between two layers, where processes wait for each other's arithmetic alone, and for all to come together at
# the start. What is slower hangs.
_STEP_TIMEOUT = timedelta(seconds=120)
# For the next step, which comes when somebody asks for it.
_IDLE_TIMEOUT = timedelta(days=3650)
# Seconds that rank 0 waits for the goodbyes, and that it gets to end by itself when another process is lost: a thread
# may wait for a device that waits for the lost one.
_GOODBYE_SECONDS = 5.0
_LOSS_SECONDS = 10.0
# Integers of the first part of a message. The steps of a few sessions fit in.
_FIRST_PART = 512


class Ranks:
    """One process among `size`, of which `rank` 0 leads. After `form` they are tied: when one is lost all end.

    `send`, `calling` and `close` are rank 0's, `receive` and `leave` the others'. Each process has one thread that
    computes, which alone calls `send`, `calling` and `receive`.
    """

    def __init__(self, rank: int, size: int, local_rank: int) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        """Its place on its machine: the number of its GPU."""
        self.lost = False
        """Whether another process ended before its time."""
        self._formed = False
        self._out_of_step = False
        self._ending = False
        self._watches: list[threading.Thread] = []
        self._log = structlog.get_logger("specpair.parallel")

    @classmethod
    def of_torchrun(cls) -> Ranks | None:
        """This process's place among those that torchrun started; None for one that is alone."""
        if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
            return None
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))

    @property
    def leads(self) -> bool:
        """Whether this is the process that serves."""
        return self.rank == 0

    def form(self, device: torch.device, on_loss: Callable[[str], None]) -> None:
        """Comes together with the others, to compute on `device` each; blocks until all are there.

        From here on a process that leads calls `on_loss` with a reason when another one is lost, and has some seconds
        to end; any other one ends at once when rank 0 is lost, and is deaf to SIGTERM and SIGINT, which torchrun
        sends to all: rank 0 decides when it is time. Raises ModelLoadError when they cannot come together.
        """
        cuda = device.type == "cuda"
        try:
            if cuda:
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if cuda else "gloo", timeout=_STEP_TIMEOUT, device_id=device if cuda else None
            )
            self._control = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
            self._goodbyes = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        except RuntimeError as error:
            raise ModelLoadError(f"the {self.size} processes do not come together: {error}", field="device") from error
        self._formed = True
        if not self.leads:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        for peer in range(1, self.size) if self.leads else (0,):
            watch = threading.Thread(target=self._watch, args=(peer, on_loss), name=f"watch-{peer}", daemon=True)
            self._watches.append(watch)
            watch.start()

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Around what every process does for itself at the start: when it fails in one, it raises in each.

        Raises ModelLoadError where it went well and another process failed.
        """
        try:
            yield
        except BaseException:
            self._outcomes(failed=True)
            raise
        if others := self._outcomes(failed=False):
            names = ", ".join(map(str, others))
            raise ModelLoadError(f"rank {names} cannot load it; the log there says why", field="model")

    def send(self, message: Sequence[int]) -> None:
        """Says the same to all others."""
        data = torch.tensor([len(message), *message])
        data = functional.pad(data, (0, max(0, _FIRST_PART - len(data))))
        dist.broadcast(data[:_FIRST_PART], 0, group=self._control)
        if len(data) > _FIRST_PART:
            dist.broadcast(data[_FIRST_PART:], 0, group=self._control)

    def receive(self) -> list[int]:
        """What rank 0 says next, whenever that is."""
        data = torch.empty(_FIRST_PART, dtype=torch.int64)
        dist.broadcast(data, 0, group=self._control)
        end = 1 + int(data[0])
        if end > _FIRST_PART:
            rest = torch.empty(end - _FIRST_PART, dtype=torch.int64)
            dist.broadcast(rest, 0, group=self._control)
            data = torch.cat([data, rest])
        return data[1:end].tolist()

    @contextmanager
    def calling(self, message: Sequence[int]) -> Iterator[None]:
        """Around what all processes compute together, of which `message` tells the others.

        Raises UnavailableError when it fails here, and from then on: nobody knows where the others stand, and what they
        still wait for would be answered with the numbers of another step.
        """
        if self._out_of_step or self.lost:
            raise UnavailableError("the processes that share the model are out of step")
        try:
            self.send(message)
            yield
        except Exception as error:
            self._out_of_step = True
            raise UnavailableError(
                f"the processes that share the model are out of step: {type(error).__name__}: {error}"
            ) from error

    def close(self, goodbye: Sequence[int]) -> None:
        """Ends the others with a message that tells them to leave, and waits until they do; not after a failure, which
        they learn of when this process ends."""
        if not self._formed or self._out_of_step or self.lost:
            return
        self._ending = True
        self.send(goodbye)
        for watch in self._watches:
            watch.join(_GOODBYE_SECONDS)

    def leave(self) -> NoReturn:
        """Says goodbye to rank 0 and ends this process."""
        self._ending = True
        dist.send(torch.zeros(1, dtype=torch.int64), 0, group=self._goodbyes)
        self.exit(0)

    def exit(self, status: int) -> NoReturn:
        """Ends this process as it is, with 1 in place of 0 if another one was lost.

        Threads inside a collective cannot be stopped, and the interpreter does not survive them.
        """
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or int(self.lost))

    def _outcomes(self, *, failed: bool) -> list[int]:
        """The ranks that failed."""
        outcomes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(outcomes, torch.tensor([int(failed)]), group=self._control)
        return [rank for rank, outcome in enumerate(outcomes) if outcome.item()]

    def _watch(self, peer: int, on_loss: Callable[[str], None]) -> None:
        try:
            dist.recv(torch.zeros(1, dtype=torch.int64), peer, group=self._goodbyes)
        except RuntimeError:
            if not self._ending:
                self._lose(peer, on_loss)

    def _lose(self, peer: int, on_loss: Callable[[str], None]) -> None:
        self.lost = True
        self._log.error("a process that shares the model is lost", rank=self.rank, lost=peer)
        if self.leads:
            on_loss(f"rank {peer} of {self.size} is lost")
            threading.Event().wait(_LOSS_SECONDS)
        self.exit(1)
