"""Laws of a client whose target comes back as something else, or that knows several, with in-memory services."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from specpair import (
    InvalidRequestError,
    OverloadedError,
    SpeculativeClient,
    UnauthenticatedError,
    UnavailableError,
)

from .. import virtual_time
from .fakes import FINGERPRINT, FakeTarget, FakeTime, continuation, text_of
from .losing import COUNT, GONE, MODES, OTHER, PARAMS, PROMPT, check, client, generate


class TestTwoTargets:
    """A client that knows two addresses."""

    @pytest.mark.parametrize("mode", MODES)
    def test_the_other_one_takes_over(self, mode):
        """In the middle of a generation, which stays there; so do the next ones."""
        undisturbed = generate(FakeTarget(), mode=mode)
        one, other = FakeTarget(breaks={3: GONE}), FakeTarget()

        async def run():
            async with client(None, mode=mode, targets=[one, other]) as opened:
                return [await opened.generate(PROMPT, PARAMS) for _ in range(3)]

        first, *others = virtual_time.run(run())
        check(first, undisturbed)
        for result in others:
            check(result, undisturbed, resumes=0)
        assert (len(one.streams), len(other.streams)) == (1, 3)

    @pytest.mark.parametrize("mode", MODES)
    def test_sessions_stay_where_they_are(self, mode):
        """One that has begun at a target does not move because another one lost its stream."""

        async def run():
            one, other = FakeTarget(), FakeTarget()
            async with client(None, mode=mode, targets=[one, other]) as opened, opened.session() as session:
                stays = await session.generate(PROMPT, PARAMS)
                one.breaks = {one.messages + 2: GONE}
                moved = await opened.generate(PROMPT, PARAMS)
                again = await session.generate((7,), PARAMS)
            assert [result.stats.resumes for result in (stays, moved, again)] == [0, 1, 0]
            assert (len(one.streams), len(other.streams)) == (2, 1)

        virtual_time.run(run())

    @pytest.mark.parametrize("mode", MODES)
    def test_the_first_one_is_not_there(self, mode):
        """A generation begins at the second address, at once."""
        absent, other, time = FakeTarget(failure=GONE), FakeTarget(), FakeTime()
        result = generate(None, mode=mode, targets=[absent, other], time=time)
        assert list(result.token_ids) == continuation(PROMPT, COUNT)
        assert (result.stats.resumes, time.waits) == (0, [])

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "refusal", [UnauthenticatedError("an expired certificate"), OverloadedError("full", retry_after=1.0)]
    )
    def test_the_first_one_refuses(self, mode, refusal):
        """What has not begun is tried at every address, whatever the first one says."""
        refusing, other, time = FakeTarget(failure=refusal), FakeTarget(), FakeTime()
        result = generate(None, mode=mode, targets=[refusing, other], time=time)
        assert list(result.token_ids) == continuation(PROMPT, COUNT)
        assert time.waits == []

    @pytest.mark.parametrize("mode", MODES)
    def test_the_other_one_refuses(self, mode):
        """A session goes on at its own target if the other one does not let it in."""
        undisturbed = generate(FakeTarget(), mode=mode)
        own, closed = FakeTarget(breaks={3: GONE}), FakeTarget(failure=UnauthenticatedError("an expired certificate"))
        check(generate(None, mode=mode, targets=[own, closed]), undisturbed)
        assert len(own.streams) == 2

    def test_the_other_one_stands_still(self):
        """A target that takes a session and says nothing does not use up the time in which another one is back."""
        undisturbed = generate(FakeTarget())

        class Still(FakeTarget):
            async def verify(self, start, within=None):
                stream = await super().verify(start, within)
                stream.delay = 3600
                return stream

        own, still = FakeTarget(breaks={3: GONE}), Still()
        check(generate(None, targets=[own, still], resume_timeout=0.4), undisturbed)
        assert still.streams[-1].cancelled

    @pytest.mark.parametrize("mode", MODES)
    def test_nobody_is_there(self, mode):
        """Each address is tried once."""
        absent, time = [FakeTarget(failure=UnavailableError(name)) for name in ("one", "two")], FakeTime()
        with pytest.raises(UnavailableError, match="two"):
            generate(None, mode=mode, targets=absent, time=time)
        assert [target.infos for target in absent] == [1, 1]
        assert time.waits == []

    @pytest.mark.parametrize(
        "runs",
        [
            {"fingerprint": OTHER},
            {"fingerprint": replace(FINGERPRINT, chat_template_sha256="cc")},
            {"model": "another"},
            {"dtype": "fp32"},
            {"quantization": "int8"},
            {"verify_width": 4},
            {"max_length": 512},
        ],
        ids=lambda runs: next(iter(runs)),
    )
    def test_one_that_runs_something_else_is_passed_over(self, runs, caplog):
        """What would say something else never gets the session: it waits for its own target to be back."""
        undisturbed = generate(FakeTarget())
        own, foreign = FakeTarget(breaks={3: GONE}), FakeTarget(runs=runs)
        with caplog.at_level(logging.WARNING, "specpair"):
            check(generate(None, targets=[own, foreign]), undisturbed)
        assert foreign.streams == []
        assert len(own.streams) == 2
        field = next(iter(runs))
        assert f"the target at target:1 has {'another fingerprint' if field == 'fingerprint' else field}" in caplog.text
        assert "passed over" in caplog.text

    @pytest.mark.parametrize("mode", MODES)
    def test_one_that_was_replaced_while_nobody_looked(self, mode):
        """What a client learnt of a target before it was restarted lets no session go on there with another model: the
        session's first message says so, and the target that runs what it began with has it again."""
        undisturbed = generate(FakeTarget())
        one, other = FakeTarget(runs={"identity": "one"}), FakeTarget(runs={"identity": "one"})

        async def run():
            async with client(None, mode=mode, targets=[one, other], chain=0) as opened:
                stream = opened.stream(PROMPT, PARAMS)
                await anext(stream)
                one.breaks = {one.messages + 1: GONE}
                assert (await opened.generate(PROMPT, PARAMS)).stats.resumes == 1  # and the other one is known from now
                other.runs = {"identity": "two"}
                one.breaks = {one.messages: GONE}
                async for _ in stream:
                    pass
                assert other.streams[-1].cancelled
                assert (len(one.streams), len(other.streams)) == (3, 2)
                return stream.result

        check(virtual_time.run(run()), undisturbed)

    def test_no_address_left(self):
        """If all targets run something else than the session began with, that is the error."""
        own, foreign = FakeTarget(breaks={3: GONE}), FakeTarget(runs={"dtype": "fp32"})
        own.falsify = lambda verdict: own.runs.update(dtype="fp16") or verdict
        with pytest.raises(UnavailableError, match=r"has dtype fp(16|32) instead of") as changed:
            generate(None, targets=[own, foreign])
        assert changed.value.reason == "TARGET_CHANGED"
        assert foreign.streams == []

    def test_any_of_them_answers_questions(self):
        """Tokenizing, explaining and health are not lost with one target."""

        async def run():
            async with client(None, targets=[FakeTarget(failure=GONE), FakeTarget()]) as opened:
                assert (await opened.info())[0].model == "target"
                assert await opened.tokenize("ab") == (97 % 50, 98 % 50)
                assert await opened.detokenize([1]) == text_of(1)
                assert (await opened.healthy())[0]

        virtual_time.run(run())


class TestBack:
    """One target, which goes and comes again."""

    @pytest.mark.parametrize("mode", MODES)
    def test_as_something_else(self, mode):
        """What comes back at the same address is asked what it runs: a session does not go on with another model."""
        target = FakeTarget(breaks={2: GONE})

        async def run():
            async with client(target, mode=mode, chain=0) as opened:
                stream = opened.stream(PROMPT, PARAMS)
                await anext(stream)
                target.runs["model"] = "another"
                with pytest.raises(UnavailableError, match="has model another instead of target") as changed:
                    async for _ in stream:
                        pass
                assert changed.value.reason == "TARGET_CHANGED"
                assert len(target.streams) == 1
                return await opened.generate(PROMPT, PARAMS)

        assert list(virtual_time.run(run()).token_ids) == continuation(PROMPT, COUNT)

    @pytest.mark.parametrize(("runs", "usable"), [({"model": "new"}, True), ({"fingerprint": OTHER}, False)])
    def test_as_something_else_before_something_begins(self, runs, usable, caplog):
        """A new generation goes on with another model, and says so, as long as ids mean the same to it."""
        target, time = FakeTarget(), FakeTime()

        async def run():
            async with client(target, mode="none", time=time) as opened:
                await opened.generate(PROMPT, PARAMS)
                target.breaks = {target.messages: GONE}
                target.runs = runs
                return await opened.generate(PROMPT, PARAMS)

        if usable:
            assert list(virtual_time.run(run()).token_ids) == continuation(PROMPT, COUNT)
            assert "has model new instead of target; new sessions begin with that" in caplog.text
        else:
            with pytest.raises(UnavailableError, match="has another fingerprint") as changed:
                virtual_time.run(run())
            assert changed.value.reason == "TARGET_CHANGED"

    @pytest.mark.parametrize("mode", MODES)
    def test_as_something_else_while_nobody_looked(self, mode, caplog):
        """A channel connects again by itself. The first message of a session says what runs there now, and the next one
        begins with that, or does not begin where the same ids mean something else."""
        target = FakeTarget(runs={"identity": "one"})

        async def run():
            async with client(target, mode=mode) as opened:
                await opened.generate(PROMPT, PARAMS)
                target.runs = {"identity": "two"}
                result = await opened.generate(PROMPT, PARAMS)
                assert list(result.token_ids) == continuation(PROMPT, COUNT)
                target.runs = {"identity": "three"}
                target.fingerprint = OTHER
                with pytest.raises(UnavailableError, match="has another fingerprint") as changed:
                    await opened.generate(PROMPT, PARAMS)
                assert changed.value.reason == "TARGET_CHANGED"

        virtual_time.run(run())
        assert "has other weights, software or hardware; new sessions begin with that" in caplog.text

    @pytest.mark.parametrize("mode", MODES)
    def test_before_something_begins(self, mode):
        """A target that was reached before is waited for, `connect_timeout` seconds; then its failure is raised."""
        target, time = FakeTarget(), FakeTime()

        async def run():
            async with client(target, mode=mode, time=time, connect_timeout=3.0) as opened:
                await opened.generate(PROMPT, PARAMS)
                target.breaks = {target.messages: GONE, target.messages + 1: GONE}
                assert (await opened.generate(PROMPT, PARAMS)).stats.resumes == 0
                assert len(time.waits) == 2
                target.failure, begin = GONE, time.now
                with pytest.raises(UnavailableError, match="the connection broke"):
                    await opened.generate(PROMPT, PARAMS)
                assert 0.5 < time.now - begin <= 3.0

        virtual_time.run(run())

    @pytest.mark.parametrize("mode", MODES)
    def test_never_there(self, mode):
        """A target that this client never reached fails at once."""
        target, time = FakeTarget(failure=GONE), FakeTime()
        with pytest.raises(UnavailableError):
            generate(target, mode=mode, time=time)
        assert (target.infos, time.waits) == (1, [])

    def test_full_when_something_begins(self):
        """A first start that finds no slot is the caller's to see, hint or not."""
        for hint in (None, 1.0):
            target, time = FakeTarget(breaks={0: OverloadedError("no slot", retry_after=hint)}), FakeTime()
            with pytest.raises(OverloadedError):
                generate(target, time=time)
            assert time.waits == []


def test_an_impossible_resume_timeout_or_address_is_refused():
    """An error that names the argument, before anything is sent."""
    with pytest.raises(InvalidRequestError) as refused:
        client(FakeTarget(), resume_timeout=-1)
    assert refused.value.field == "resume_timeout"
    for address in ("", "a:1,", ",a:1", "a:1,,b:1"):
        with pytest.raises(InvalidRequestError) as refused:
            SpeculativeClient(address, "none")
        assert refused.value.field == "target"
