"""What a proposed token costs, for several sessions in lockstep and one by one: `python bench/draft_step.py MODEL`.

Runs the draft service's decoding without gRPC and without a thread of its own. Every round each session asks for
`--ids` ids behind one token that it did not guess, so a round is as many steps as ids. Two questions:

* batching: milliseconds for each proposed token, the sessions together and one after another, in turns in one run;
* overhead: what a step costs beside the forward pass, which is laying out, choosing and reading back.

Prints a table and writes JSON to bench/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from report import OtherWork, machine, pin, write_report
from specpair.errors import SpecpairError
from specpair_draft.asks import Ask, Timed, Turn
from specpair_draft.lockstep import Lockstep
from specpair_draft.sessions import Session
from specpair_draft.steps import STEP_WIDTHS, Decoder
from specpair_runtime.models.config import ModelConfig
from specpair_runtime.models.runner import ModelRunner
from specpair_runtime.models.serving_model import load_serving_model
from specpair_runtime.sampling.params import GREEDY, SamplingParams
from specpair_runtime.serving import ServiceStatus

_KINDS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=0.8, seed=1),
    "rejection": SamplingParams(temperature=0.8, seed=1, rejection=True),
}
_CONTEXT = 200


@dataclass(frozen=True)
class Options:
    """What is measured; defaults are those of the published figures."""

    model: str
    dtype: str = "fp32"
    sessions: tuple[int, ...] = (1, 2, 4, 8)
    ids: int = 7
    rounds: int = 30
    threads: int = 1


@dataclass(frozen=True)
class Cost:
    """Medians over rounds, in milliseconds; `overhead` is what a step takes beside the forward pass."""

    kind: str
    sessions: int
    together_per_token: float
    one_by_one_per_token: float
    forward_per_step: float
    overhead_per_step: float


class _Timed:
    """A function that sums up the seconds that it takes."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function
        self.seconds = 0.0
        self.calls = 0

    def __call__(self, *args: object) -> torch.Tensor:
        began = time.perf_counter()
        result = self._function(*args)
        self.seconds += time.perf_counter() - began
        self.calls += 1
        return result


class _Group:
    """Sessions of one kind, each with its prompt in the slot."""

    def __init__(self, runner: ModelRunner, count: int, params: SamplingParams) -> None:
        self._lockstep = Lockstep(Decoder(runner), prefill_chunk=256)
        self._sessions = [Session(slot, runner.max_length, run_ahead=False) for slot in range(count)]
        self._vocabulary = runner.vocabulary
        for number, session in enumerate(self._sessions):
            generator = torch.Generator().manual_seed(number)
            prompt = torch.randint(0, runner.vocabulary, (_CONTEXT,), generator=generator).tolist()
            self._lockstep.begin(session, Turn(prompt, _CONTEXT, params))
        while self._lockstep.turn():
            pass

    def round(self, number: int, ids: int, *, together: bool) -> None:
        """Every session gets one proposal behind a new token."""
        groups = [self._sessions] if together else [[session] for session in self._sessions]
        for group in groups:
            said: list[Timed | SpecpairError] = []
            for session in group:
                ask = Ask(_CONTEXT, [number % self._vocabulary], ids)
                self._lockstep.take(session, ask, said.append, time.perf_counter_ns())
            while len(said) < len(group):
                self._lockstep.turn()


def _measure(runner: ModelRunner, options: Options) -> Iterator[Cost]:
    """The costs of every kind and number of sessions; both ways take turns, so that noise meets both."""
    for kind, params in _KINDS.items():
        for count in options.sessions:
            yield _cost(runner, options, kind, _Group(runner, count, params), count)


def _cost(runner: ModelRunner, options: Options, kind: str, group: _Group, count: int) -> Cost:
    whole: dict[bool, list[float]] = {True: [], False: []}
    forwards, overheads = [], []
    original = runner.logits
    for number in range(-3, options.rounds):
        for together in (True, False):
            forward = _Timed(original)
            # An attribute of the instance hides the method: the engine is measured as it is.
            vars(runner)["logits"] = forward
            began = time.perf_counter()
            # Another token each time: nothing is ready.
            group.round(2 * (number + 3) + together, options.ids, together=together)
            seconds = time.perf_counter() - began
            del vars(runner)["logits"]
            if number < 0:
                continue
            whole[together].append(seconds / (count * options.ids))
            if together:
                forwards.append(forward.seconds / forward.calls)
                overheads.append((seconds - forward.seconds) / forward.calls)
    return Cost(kind, count, *map(_median_ms, (whole[True], whole[False], forwards, overheads)))


def _median_ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 4)


def _parse() -> tuple[Options, Path]:
    defaults = Options(model="")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("--dtype", default=defaults.dtype, choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--sessions", type=int, nargs="+", default=defaults.sessions)
    parser.add_argument("--ids", type=int, default=defaults.ids, help="ids of a proposal")
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--output", type=Path, default=Path("bench/results/draft_step.json"))
    given = parser.parse_args()
    options = Options(
        model=given.model,
        dtype=given.dtype,
        sessions=tuple(given.sessions),
        ids=given.ids,
        rounds=given.rounds,
        threads=given.threads,
    )
    return options, given.output


def main() -> None:
    """Measures, prints and writes."""
    options, output = _parse()
    cores = pin(options.threads)
    config = ModelConfig.model_validate(
        {
            "model": options.model,
            "dtype": options.dtype,
            "device": "cpu",
            "slots": max(options.sessions),
            "max_length": 1024,
            "threads": options.threads,
        }
    )
    facts = machine(cores)
    runner = load_serving_model(config, STEP_WIDTHS, ServiceStatus()).runner
    other = OtherWork()
    costs = []
    for cost in _measure(runner, options):
        costs.append(cost)
        print(
            f"{cost.kind:9} {cost.sessions} sessions: {cost.together_per_token:7.3f} ms a token together, "
            f"{cost.one_by_one_per_token:7.3f} one by one; a step {cost.forward_per_step:7.3f} ms of forward pass "
            f"and {cost.overhead_per_step:6.3f} beside it"
        )
    figures = {"options": asdict(options), "other_work_cores": other.cores(), "cost": [asdict(cost) for cost in costs]}
    write_report(output, figures, facts)


if __name__ == "__main__":
    main()
