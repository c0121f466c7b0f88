"""The draft is advice: whatever becomes of it, the tokens stay the same and the result says what happened."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import socket
import time

import pytest

from specpair import DraftMismatchError, SamplingParams, Source, SpeculativeClient
from specpair.v1 import common_pb2

from ..amounts import runs
from .drafts import hanging, mute, prophet, serving
from .processes import DEMO, UNHURRIED, run

PARAMS = SamplingParams(max_new_tokens=32)
SAMPLED = SamplingParams(max_new_tokens=32, temperature=0.9, seed=11)
LONG = SamplingParams(max_new_tokens=240, ignore_eos=True)
LONG_SAMPLED = SamplingParams(max_new_tokens=240, ignore_eos=True, temperature=0.9, seed=11)
# Seconds within which a draft that is back is used again.
_BACK = 2.0
# Tokens of a generation before whose last ones a draft is killed at the latest.
_LEFT = 60


@pytest.fixture(scope="module")
def prompt(prompts):
    """A prompt that loses nothing by a slow draft."""
    return prompts[7]


@pytest.fixture(scope="module")
def expected(bf16_target, prompt):
    """Tokens of the target alone, for each of the parameters above."""

    async def alone():
        async with SpeculativeClient(bf16_target.address, "none") as client:
            every = (PARAMS, SAMPLED, LONG, LONG_SAMPLED)
            return {params: (await client.generate(prompt, params)).token_ids for params in every}

    return run(alone())


@pytest.fixture(scope="module")
def victim(launch):
    """Returns a draft service that may be hung and killed. If it has been it lives again."""
    draft = launch("draft", f"--model={DEMO / 'draft'}", "--slots=2")

    def living():
        if not draft.alive:
            draft.restart()
        assert draft.address
        return draft

    return living


@pytest.fixture(scope="module")
def foreign_draft(launch, tmp_path_factory):
    """A draft service with a tiny model and another tokenizer."""
    directory = tmp_path_factory.mktemp("foreign")
    _make_foreign_model(directory)
    return launch("draft", f"--model={directory}", "--slots=1")


def check_lost(result, reason, at_least=1):
    """The result records one change to n-gram, and no token of a model from then on."""
    [change] = result.stats.proposer_changes
    assert change.proposer == result.stats.proposer == "ngram"
    assert reason in change.reason
    assert change.round >= at_least


async def generate_with_an_accident(client, prompt, params, accident, after):
    """The result of a generation during which something happens, `after` chunks into it; and the tokens until then."""
    async with client.stream(prompt, params) as stream:
        chunks = 0
        before = 0
        async for chunk in stream:
            chunks += 1
            if chunks <= after:
                before += len(chunk.tokens)
            if chunks == after:
                await accident()
    assert chunks > after + 2, "the accident came too late to matter"
    check_lost_tokens(stream.result, before)
    return stream.result


def check_lost_tokens(result, before):
    """No token that came later than one round after the accident is a draft model's."""
    later = result.tokens[before + 2 :]
    assert later
    assert Source.MODEL not in {token.source for token in later}


class TestLostUnderWay:
    """A draft that is lost in the middle of a generation."""

    def test_hangs_and_comes_back(self, bf16, victim, prompt, expected):
        """Its process stands still: n-gram after the round's time limit. Awake again, it is used again and is free."""
        draft = victim()

        async def stop():
            draft.send(signal.SIGSTOP)

        async def check():
            address = (bf16.target.address, draft.address)
            async with SpeculativeClient(*address, draft_length=1, draft_timeout=4.0, connect_timeout=4.0) as client:
                result = await generate_with_an_accident(client, prompt, PARAMS, stop, after=3)
                assert result.token_ids == expected[PARAMS]
                check_lost(result, "no proposal within", at_least=4)
                again = await client.generate(prompt, PARAMS)
                assert again.token_ids == expected[PARAMS]
                check_lost(again, "no proposal within")
                assert again.stats.proposing_seconds < 4.0, "nobody waits for it a second time"
                draft.send(signal.SIGCONT)
                draft.wait_until_free()
                async with asyncio.timeout(10 * _BACK):
                    while True:
                        recovered = await client.generate(prompt, PARAMS)
                        assert recovered.token_ids == expected[PARAMS]
                        if not recovered.stats.proposer_changes:
                            break
                assert recovered.stats.proposer == "model"

        run(check())
        draft.wait_until_free()

    def test_killed(self, bf16, victim, prompt, expected):
        """Its process is killed under two sessions, one greedy and one sampled: n-gram from there on."""
        draft = victim()
        both = (PARAMS, SAMPLED)
        address = (bf16.target.address, draft.address)

        async def check():
            async with SpeculativeClient(*address, draft_length=1, draft_timeout=UNHURRIED) as client:
                arrived = asyncio.Barrier(len(both))

                async def accident():
                    await arrived.wait()
                    if draft.alive:
                        draft.send(signal.SIGKILL)

                results = await asyncio.gather(
                    *(generate_with_an_accident(client, prompt, params, accident, after=3) for params in both)
                )
                for params, result in zip(both, results, strict=True):
                    assert result.token_ids == expected[params]
                    check_lost(result, "draft lost", at_least=4)
                    again = await client.generate(prompt, params)
                    assert again.token_ids == expected[params]
                    check_lost(again, "draft lost")

        run(check())
        assert draft.wait() == -signal.SIGKILL

    def test_killed_at_a_random_round(self, bf16, victim, prompt, expected):
        """Whenever its process is killed, for every way to ask it: the same tokens, and n-gram from there on."""
        for number in range(runs(3)):
            draft, rng = victim(), random.Random(number)
            params = (LONG, LONG_SAMPLED)[number % 2]
            length = (1, 4, None)[number % 3]
            options = {"draft_length": length, "chain": rng.choice([None, 0, 2]), "lookup": False}
            options["draft_timeout"] = UNHURRIED
            # What is left takes a few rounds even if every proposal comes true, and more than are under way at once.
            after = rng.randrange(len(expected[params]) - _LEFT)

            async def check(draft, params, options, after):
                async with SpeculativeClient(bf16.target.address, draft.address, **options) as client:
                    async with client.stream(prompt, params) as stream:
                        killed = False
                        async for _ in stream:
                            if not killed and len(stream.tokens) > after:
                                draft.send(signal.SIGKILL)
                                killed = True
                    return stream.result

            result = run(check(draft, params, options, after))
            assert draft.wait() == -signal.SIGKILL
            case = f"run {number}: {options}, killed behind token {after}"
            assert result.token_ids == expected[params], case
            changes = [change.proposer for change in result.stats.proposer_changes]
            # Where the length is free, a draft that does not pay is not asked, and its loss may not be seen.
            assert changes == ["ngram"] or (length is None and not changes), case

    def test_never_answers_a_round(self, bf16, prompt, expected):
        """A service that is there and stops answering, from the first round or from the third."""

        async def check(address):
            async with SpeculativeClient(bf16.target.address, address, draft_length=2, draft_timeout=4.0) as client:
                return await client.generate(prompt, PARAMS)

        for behaviour, round in ((hanging, 3), (mute, 1)):
            with serving(behaviour) as fake:
                result = run(check(fake.address))
            assert result.token_ids == expected[PARAMS]
            [change, *_] = result.stats.proposer_changes  # it answers again when it is asked anew
            assert (change.round, change.proposer) == (round, "ngram")
            assert "no proposal within" in change.reason

    def test_slow_draft_is_not_lost(self, bf16, prompt, expected):
        """A draft within its time limit stays, however little it helps."""

        def slow(session, ask):
            time.sleep(0.02)
            yield from told(session, ask)

        told = prophet({prompt: expected[PARAMS]})

        async def check(address):
            async with SpeculativeClient(bf16.target.address, address, draft_timeout=UNHURRIED) as client:
                return await client.generate(prompt, PARAMS)

        with serving(slow) as fake:
            result = run(check(fake.address))
        assert result.token_ids == expected[PARAMS]
        assert not result.stats.proposer_changes


class TestBackUnderWay:
    """A draft that comes back in the middle of a generation is used again within two seconds.

    A busy machine may take longer now and then, hence the tries; tests/client/test_failover.py has the law itself, in
    virtual time. The tokens have to be the same in each of them.
    """

    @staticmethod
    def in_time(attempt):
        """Makes an attempt, which returns statistics and seconds, until it is one loss and one return in time: three
        times at most."""
        seen = []
        for _ in range(3):
            stats, back = attempt()
            changes = [change.proposer for change in stats.proposer_changes]
            story = (changes, stats.draft_losses, stats.draft_returns, stats.proposer)
            if story == (["ngram", "model"], 1, 1, "model") and back < _BACK:
                return
            seen.append((story, back))
        raise AssertionError(seen)

    @staticmethod
    async def go_through(client, params, prompt, accident, mend):
        """A generation that loses its draft by an accident, and has it back after `mend`, at whose end that is there.

        Returns the result, and how long it took from there until the draft was used again, in seconds; inf: it was not.
        """
        async with client.stream(prompt, params) as stream:
            chunks, mending, mended, back = 0, None, None, math.inf
            async for chunk in stream:
                chunks += 1
                proposer = stream.stats.proposer
                if chunks == 3:
                    accident()
                elif mending is None and chunks > 3 and proposer == "ngram":
                    mending = asyncio.create_task(asyncio.to_thread(mend))
                if mending is not None and mended is None and mending.done():
                    await mending
                    mended = time.monotonic()
                if mended is not None and Source.MODEL in {token.source for token in chunk.tokens}:
                    back = min(back, time.monotonic() - mended)
                # Whoever reads slowly makes a generation long.
                await asyncio.sleep(0.01 if mending is None or back < math.inf else 0.5 if mended is None else 0.05)
        return stream.result, back

    @pytest.mark.parametrize("params", [LONG, LONG_SAMPLED], ids=["greedy", "sampled"])
    def test_hung_and_woken(self, bf16, victim, prompt, expected, params):
        """SIGSTOP, and SIGCONT once the session goes on without it. What it says late is not used."""
        draft = victim()

        async def check():
            options = {"draft_length": 1, "draft_timeout": 3.0, "lookup": False}
            async with SpeculativeClient(bf16.target.address, draft.address, **options) as client:
                return await self.go_through(
                    client, params, prompt, lambda: draft.send(signal.SIGSTOP), lambda: draft.send(signal.SIGCONT)
                )

        def attempt():
            result, back = run(check())
            assert result.token_ids == expected[params]
            draft.wait_until_free()
            return result.stats, back

        self.in_time(attempt)

    def test_killed_and_restarted(self, bf16, victim, prompt, expected):
        """Another process at the same address; the time counts from when it reports to be serving."""

        async def check(draft):
            def kill():
                draft.send(signal.SIGKILL)
                draft.wait()

            options = {"draft_length": 1, "draft_timeout": 3.0, "lookup": False}
            async with SpeculativeClient(bf16.target.address, draft.address, **options) as client:
                return await self.go_through(client, LONG, prompt, kill, victim)

        def attempt():
            result, back = run(check(victim()))
            assert result.token_ids == expected[LONG]
            victim().wait_until_free()
            return result.stats, back

        self.in_time(attempt)

    def test_hung_under_many(self, bf16, victim, prompt, expected):
        """Sessions with a slot and without one: one round's time for each, however many wait for the same process."""
        draft = victim()
        every = (LONG, LONG_SAMPLED, PARAMS, SAMPLED)

        async def check():
            async with SpeculativeClient(bf16.target.address, draft.address, draft_timeout=3.0) as client:
                async with client.stream(prompt, LONG) as first:
                    assert await anext(first)
                    calls = [asyncio.create_task(client.generate(prompt, params)) for params in every[1:]]
                    draft.send(signal.SIGSTOP)
                    async for _ in first:
                        pass
                return [first.result, *await asyncio.gather(*calls)]

        try:
            results = run(check())
        finally:
            draft.send(signal.SIGCONT)
        for params, result in zip(every, results, strict=True):
            assert result.token_ids == expected[params]
            assert result.stats.proposing_seconds < 2 * 3.0
        draft.wait_until_free()


class TestNotThere:
    """A draft that cannot be used from the beginning."""

    @pytest.mark.parametrize("prefix", ["", "auto:"])
    def test_nobody_listens(self, bf16, prompt, expected, prefix):
        """Nobody at the address: n-gram from the first round."""
        with socket.socket() as reserved:  # bound, but not listening
            reserved.bind(("127.0.0.1", 0))
            address = f"{prefix}127.0.0.1:{reserved.getsockname()[1]}"
            result = run(_generate(bf16.target.address, address, prompt, PARAMS))
        assert result.token_ids == expected[PARAMS]
        check_lost(result, "draft unreachable")
        assert result.stats.proposer_changes[0].round == 1

    def test_somebody_listens_and_says_nothing(self, bf16, prompt, expected):
        """A connection that nobody answers: n-gram after `connect_timeout`."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            result = run(_generate(bf16.target.address, address, prompt, PARAMS, connect_timeout=2.0))
        assert result.token_ids == expected[PARAMS]
        check_lost(result, "draft unreachable")

    def test_comes_back(self, bf16, prompt, expected):
        """One client uses a draft that comes, goes, and comes again at the same address."""
        behaviour = prophet({prompt: expected[PARAMS]})

        async def check():
            with serving(behaviour) as fake:
                address = fake.address
                async with SpeculativeClient(bf16.target.address, address, draft_timeout=UNHURRIED) as client:
                    sources = [(await generate(client)).stats.proposer]
                    fake.stop()
                    sources.append((await generate(client)).stats.proposer)
                    with serving(behaviour, listen=address):
                        deadline = time.monotonic() + 60
                        while (proposer := (await generate(client)).stats.proposer) != "model":
                            assert time.monotonic() < deadline
                        sources.append(proposer)
            assert sources == ["model", "ngram", "model"]

        async def generate(client):
            result = await client.generate(prompt, PARAMS)
            assert result.token_ids == expected[PARAMS]
            return result

        run(check())


async def _generate(target, draft, prompt, params, **options):
    async with SpeculativeClient(target, draft, **options) as client:
        return await client.generate(prompt, params)


class TestAnotherVocabulary:
    """A draft that means something else by its ids is refused by name, or done without on request."""

    def test_refused(self, bf16, foreign_draft, prompt, expected):
        """DraftMismatchError names the field; the target serves on."""
        with pytest.raises(DraftMismatchError) as caught:
            run(_generate(bf16.target.address, foreign_draft.address, prompt, PARAMS))
        assert caught.value.field == "draft.fingerprint.vocabulary_size"
        assert "300" in str(caught.value)
        result = run(_generate(bf16.target.address, "none", prompt, PARAMS))
        assert result.token_ids == expected[PARAMS]
        foreign_draft.wait_until_free()

    def test_auto(self, bf16, foreign_draft, prompt, expected):
        """With `auto:` the generation goes on with n-gram and says why."""
        result = run(_generate(bf16.target.address, f"auto:{foreign_draft.address}", prompt, PARAMS))
        assert result.token_ids == expected[PARAMS]
        check_lost(result, "draft.fingerprint.vocabulary_size")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("vocabulary_size", 4095),
            ("vocabulary_sha256", "00" * 32),
            ("special_tokens_sha256", "00" * 32),
            ("eos_token_ids", [1, 2]),
        ],
    )
    def test_every_field_counts(self, bf16, prompt, expected, field, value):
        """Each part of the fingerprint by itself is reason enough."""
        fingerprint = bf16.target.info().fingerprint
        fingerprint.ClearField(field)
        fingerprint.MergeFrom(common_pb2.Fingerprint(**{field: value}))
        with serving(mute, fingerprint=fingerprint) as fake:
            with pytest.raises(DraftMismatchError) as caught:
                run(_generate(bf16.target.address, fake.address, prompt, PARAMS))
            assert caught.value.field == f"draft.fingerprint.{field}"
            result = run(_generate(bf16.target.address, f"auto:{fake.address}", prompt, PARAMS))
            assert result.token_ids == expected[PARAMS]
            assert fake.sessions == 0

    def test_another_chat_template_does_not_matter(self, bf16, prompt, expected):
        """Only the target renders chats."""
        fingerprint = bf16.target.info().fingerprint
        fingerprint.chat_template_sha256 = "00" * 32
        with serving(prophet({prompt: expected[PARAMS]}), fingerprint=fingerprint) as fake:
            result = run(_generate(bf16.target.address, fake.address, prompt, PARAMS, draft_timeout=UNHURRIED))
        assert result.token_ids == expected[PARAMS]
        assert result.stats.accepted_by_source == {Source.MODEL: result.stats.proposed}


def _make_foreign_model(directory):
    """A tiny random Llama with a tokenizer of 300 made-up words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words = {"<|endoftext|>": 0, **{f"word{n}": n for n in range(1, 300)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
