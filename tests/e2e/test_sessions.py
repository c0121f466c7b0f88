"""The Verify stream by hand: stale blocks, resumed sessions, and the same tokens as Generate."""

from __future__ import annotations

import random

import grpc
import pytest

from specpair import SamplingParams, SpeculativeClient
from specpair.v1 import common_pb2, target_pb2

from .processes import run
from .sessions import APPLIED, STALE, RawSession, ids_prompt, target_stub

TOKENS = 20
SAMPLING = [
    common_pb2.SamplingParams(max_new_tokens=TOKENS),
    common_pb2.SamplingParams(max_new_tokens=TOKENS, temperature=0.9, top_p=0.95, seed=9),
    common_pb2.SamplingParams(max_new_tokens=TOKENS, temperature=1.5, top_k=50, seed=2**64 - 2),
]
ON = common_pb2.StopCriteria(ignore_eos=True)
sampled = pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "top-p", "top-k"])


async def generate(stub, prompt, committed=(), **fields):
    """What the Generate call answers: ids, and the text of each."""
    ids, texts, finish_reason = [], [], None
    call = stub.Generate(target_pb2.GenerateRequest(prompt=ids_prompt(prompt), committed_token_ids=committed, **fields))
    assert (await call.read()).started.length == len(prompt) + len(committed)
    while (response := await call.read()) is not grpc.aio.EOF:
        assert not finish_reason
        committed_now = response.committed
        assert len(committed_now.token_ids) == len(committed_now.text_lengths) == 1
        assert list(committed_now.text_lengths) == [len(committed_now.text_delta)]
        ids += committed_now.token_ids
        texts.append(committed_now.text_delta)
        finish_reason = committed_now.finish_reason
    assert finish_reason
    return ids, texts


class TestGenerate:
    """Generate is Verify with empty blocks, which is the pair."""

    @sampled
    def test_equals_empty_blocks_and_the_pair(self, bf16, prompts, sampling):
        """The same ids and the same text for each of them."""

        async def check():
            params = SamplingParams(
                max_new_tokens=TOKENS,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p if sampling.HasField("top_p") else None,
                seed=sampling.seed,
                ignore_eos=True,
            )
            async with target_stub(bf16.target.address) as stub, SpeculativeClient(*bf16("model")) as pair:
                for prompt in (prompts[0], prompts[8], prompts[10]):
                    ids, texts = await generate(stub, prompt, sampling=sampling, stop=ON)
                    session = await RawSession.open(stub, prompt, sampling=sampling, stop=ON)
                    assert await session.run() == ids
                    assert session.texts == texts
                    result = await pair.generate(prompt, params)
                    assert list(result.token_ids) == ids
                    assert [token.text for token in result.tokens] == texts

        run(check())

    def test_tokenize_and_detokenize(self, bf16, reference, heldout):
        """A text comes back from its ids, which are the tokenizer's."""
        texts = [*heldout[:10], "x", " \n\t ", "naïve café 漢字 🎉", "def f():\n\treturn 'é'\n"]

        async def check():
            async with SpeculativeClient(*bf16("none")) as client:
                for text in texts:
                    ids = await client.tokenize(text)
                    assert ids == reference.ids(text)
                    assert await client.detokenize(ids) == text
                end = reference.tokenizer.eos_token_id
                assert await client.detokenize([end]) == ""
                assert await client.detokenize([end], keep_special_tokens=True) == reference.tokenizer.eos_token
                assert await client.detokenize([]) == ""

        run(check())


class TestStale:
    """A block that does not continue the session is answered stale and changes nothing."""

    @sampled
    def test_any_disturbance(self, bf16, prompts, sampling):
        """Wrong lengths, wrong last tokens, replays, duplicates and blocks too early, between good ones."""
        chance = random.Random(sampling.seed)
        prompt = prompts[8]

        async def check():
            async with target_stub(bf16.target.address) as stub:
                expected, texts = await generate(stub, prompt, sampling=sampling, stop=ON)
                truth = [*prompt, *expected]
                session = await RawSession.open(stub, prompt, sampling=sampling, stop=ON)
                before = session.block([1, 2, 3])
                stale = 0
                while not session.finish_reason:
                    length = len(session.tokens)
                    disturbances = [
                        session.block([5, 6], base_length=length - 1),
                        session.block([5, 6], base_length=length + 1),
                        session.block([], base_length=0),
                        session.block([5], base_length=2**32 - 1),
                        session.block([5], last_token_id=session.tokens[-1] ^ 1),
                        session.block([5], base_length=length - 1, last_token_id=session.tokens[-2]),
                        session.block(truth[length + 1 : length + 3], base_length=length + 1),
                    ]
                    if before.base_length != length:
                        disturbances.append(before)
                    for block in chance.sample(disturbances, 2):
                        verdict = await session.send(block)
                        assert verdict.status == STALE
                        assert (verdict.round, verdict.base_length) == (block.round, length)
                        assert not verdict.committed.token_ids
                        assert not verdict.committed.text_delta
                        stale += 1
                    count = chance.randrange(8)
                    told = [chance.choice([id_, id_, id_, 7]) for id_ in truth[length : length + count]]
                    before = session.block(told)
                    verdict = await session.send(before)
                    assert verdict.status == APPLIED
                assert session.output == expected
                assert "".join(session.texts) == "".join(texts)
                assert stale >= 6
                await session.finish()

        run(check())

    def test_in_flight(self, bf16, prompts):
        """Blocks sent without waiting are judged in order: duplicates are stale, one in advance may hold."""
        prompt = prompts[8]
        sampling = SAMPLING[0]

        async def check():
            async with target_stub(bf16.target.address) as stub:
                expected, _ = await generate(stub, prompt, sampling=sampling, stop=ON)
                session = await RawSession.open(stub, prompt, sampling=sampling, stop=ON)
                start = len(prompt)
                blocks = [
                    (session.block(expected[0:3], round=1), APPLIED),
                    (session.block(expected[0:3], round=2), STALE),  # duplicate
                    (session.block([], round=3, base_length=start + 9, last_token_id=expected[8]), STALE),  # too early
                    (session.block(expected[4:6], round=4, base_length=start + 4, last_token_id=expected[3]), APPLIED),
                    (session.block(expected[7:9], round=5, base_length=start + 7, last_token_id=expected[6]), APPLIED),
                    (session.block([], round=6, base_length=start + 4, last_token_id=expected[3]), STALE),  # replay
                ]
                for block, _ in blocks:
                    await session.call.write(target_pb2.VerifyRequest(block=block))
                for n, (_, status) in enumerate(blocks, 1):
                    verdict = await session.receive()
                    assert (verdict.round, verdict.status) == (n, status)
                assert session.output == expected[:10]
                await session.run()
                assert session.output == expected

        run(check())

    def test_last_token_is_optional(self, bf16, prompts):
        """A block that names no last token is judged by its length alone."""

        async def check():
            async with target_stub(bf16.target.address) as stub:
                session = await RawSession.open(stub, prompts[8])
                block = session.block()
                block.ClearField("last_token_id")
                assert (await session.send(block)).status == APPLIED
                session.call.cancel()

        run(check())


class TestResume:
    """A session that broke off goes on where it was: the same tokens, the same text."""

    @sampled
    def test_any_cut(self, bf16, prompts, sampling):
        """Reopened behind any committed token, with Verify or Generate, with or without proposals."""
        chance = random.Random(4)

        async def check():
            async with target_stub(bf16.target.address) as stub:
                for prompt in (prompts[0], prompts[10], prompts[13]):
                    ids, texts = await generate(stub, prompt, sampling=sampling, stop=ON)
                    for cut in (1, chance.randrange(2, TOKENS - 1), TOKENS - 1):
                        session = await RawSession.open(stub, prompt, ids[:cut], sampling=sampling, stop=ON)
                        while not session.finish_reason:
                            told = [*ids, 0][cut + len(session.output) :][: chance.randrange(8)]
                            told = [chance.choice([id_, id_, id_, 9]) for id_ in told]
                            assert (await session.send(session.block(told))).status == APPLIED
                        assert session.output == ids[cut:]
                        assert "".join(session.texts) == "".join(texts[cut:])
                        await session.finish()
                        rest, _ = await generate(stub, prompt, ids[:cut], sampling=sampling, stop=ON)
                        assert rest == ids[cut:]

        run(check())

    def test_broken_off_under_way(self, bf16, prompts):
        """Broken off three times at random points; what the sessions said together is the whole."""
        chance = random.Random(6)
        prompt, sampling = prompts[9], SAMPLING[1]

        async def check():
            async with target_stub(bf16.target.address) as stub:
                ids, texts = await generate(stub, prompt, sampling=sampling, stop=ON)
                committed, said = [], ""
                for _ in range(3):
                    session = await RawSession.open(stub, prompt, committed, sampling=sampling, stop=ON)
                    for _ in range(chance.randrange(1, 3)):
                        told = ids[len(committed) + len(session.output) :][:3]
                        await session.send(session.block(told[: chance.randrange(3)]))
                    session.call.cancel()
                    committed += session.output
                    said += "".join(session.texts)
                session = await RawSession.open(stub, prompt, committed, sampling=sampling, stop=ON)
                assert committed + await session.run() == ids
                assert said + "".join(session.texts) == "".join(texts)

        run(check())

    def test_inside_a_stop_string(self, bf16, prompts):
        """Text held back for a stop string is held back again: the stop string is found across the cut."""
        prompt = prompts[9]
        sampling = SAMPLING[2]

        async def check():
            async with target_stub(bf16.target.address) as stub:
                ids, texts = await generate(stub, prompt, sampling=sampling, stop=ON)
                text = "".join(texts)
                # From the middle of one token's text to the middle of another's, two further on.
                i = next(i for i in range(4, TOKENS - 3) if all(len(texts[j]) > 0 for j in range(i, i + 3)))
                start = len("".join(texts[:i])) + len(texts[i]) - 1
                stop = text[start : len("".join(texts[: i + 2])) + 1]
                criteria = common_pb2.StopCriteria(ignore_eos=True, stop_strings=[stop])
                ended, ended_texts = await generate(stub, prompt, sampling=sampling, stop=criteria)
                found = text.find(stop)
                assert "".join(ended_texts) == text[:found]
                assert ended == ids[: len(ended)]
                for cut in range(1, len(ended)):
                    session = await RawSession.open(stub, prompt, ids[:cut], sampling=sampling, stop=criteria)
                    assert await session.run() == ended[cut:]
                    assert session.finish_reason == common_pb2.FINISH_REASON_STOP_STRING
                    assert "".join(ended_texts[:cut] + session.texts) == text[:found]

        run(check())
