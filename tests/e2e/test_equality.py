"""The law that matters: the output is the target's, whoever proposes, however much and however many sessions run."""

from __future__ import annotations

import asyncio
from itertools import cycle

import pytest

from specpair import FinishReason, SamplingParams, Source, SpeculativeClient, SyncSpeculativeClient

from .conftest import BORDER, FP32_LENGTH
from .drafts import half_true, prophet, serving
from .processes import run

TOKENS = 16
LENGTHS = range(1, 8)
PROPOSERS = ["model", "ngram", "liar"]


async def generate_all(addresses, jobs, at_once=4, **options):
    """Results of (prompt, params) jobs, from one client."""
    limit = asyncio.Semaphore(at_once)
    async with SpeculativeClient(*addresses, **options) as client:

        async def one(prompt, params):
            async with limit:
                return await client.generate(prompt, params)

        return await asyncio.gather(*(one(*job) for job in jobs))


def check_provenance(result):
    """Every token has a source, and the statistics count the same ones."""
    counted = {source: sum(token.source is source for token in result.tokens) for source in Source}
    assert dict(result.stats.accepted_by_source) == {
        source: count for source, count in counted.items() if count and source is not Source.TARGET
    }
    assert result.stats.accepted == len(result.tokens) - counted[Source.TARGET] <= result.stats.proposed
    assert result.stats.output_tokens == len(result.tokens)


@pytest.fixture(scope="module")
def expected(reference, prompts):
    """What transformers generates for each prompt."""
    return [reference.greedy(prompt, TOKENS) for prompt in prompts]


class TestFp32EqualsTransformers:
    """In fp32 the pair's greedy output is that of transformers' `generate` on the same weights."""

    def test_prompts_cover_the_slot(self, prompts):
        """At least 20 prompts of different lengths, of one token, across the prefill chunk, and near the slot's end."""
        lengths = {len(prompt) for prompt in prompts}
        assert len(lengths) == len(prompts) >= 20
        assert {1, 255, 256, 257} < lengths
        assert FP32_LENGTH - 32 <= max(lengths) <= FP32_LENGTH - TOKENS

    @pytest.mark.parametrize("kind", [*PROPOSERS, "none"])
    def test_adaptive_draft_length(self, fp32, prompts, expected, kind):
        """With every kind of proposer, at the draft length that the client chooses."""
        params = SamplingParams(max_new_tokens=TOKENS)
        results = run(generate_all(fp32(kind), [(prompt, params) for prompt in prompts]))
        assert [result.token_ids for result in results] == expected
        for result in results:
            check_provenance(result)
        proposed = sum(result.stats.proposed for result in results)
        assert (proposed == 0) == (kind == "none")

    @pytest.mark.parametrize("kind", PROPOSERS)
    def test_every_draft_length(self, fp32, prompts, expected, kind):
        """With every draft length that fits a block, each on several prompts."""
        params = SamplingParams(max_new_tokens=TOKENS)

        async def all_lengths():
            results = {}
            for length in LENGTHS:
                chosen = range(length - 1, len(prompts), len(LENGTHS))
                jobs = [(prompts[i], params) for i in chosen]
                results |= zip(chosen, await generate_all(fp32(kind), jobs, draft_length=length), strict=True)
            return results

        results = run(all_lengths())
        assert len(results) == len(prompts)
        assert {i: result.token_ids for i, result in results.items()} == dict(enumerate(expected))

    @pytest.mark.parametrize("length", [*LENGTHS, None])
    def test_a_draft_that_is_right(self, fp32, prompts, expected, length):
        """A draft that knows the output is accepted in full: every block brings a token of the target's own as well.

        The one exception: a block across the border of two attended lengths is judged up to the border.
        """
        some = slice(length or 0, None, 6)
        outputs = dict(zip(prompts, expected, strict=True))
        params = SamplingParams(max_new_tokens=TOKENS)
        with serving(prophet(outputs)) as fake:
            addresses = (fp32.target.address, fake.address)
            jobs = [(prompt, params) for prompt in prompts[some]]
            results = run(generate_all(addresses, jobs, draft_length=length, lookup=False))
        assert [result.token_ids for result in results] == expected[some]
        for result in results:
            check_provenance(result)
            crossing = len(result.prompt_token_ids) <= BORDER < len(result.prompt_token_ids) + TOKENS
            assert result.stats.proposed > 0
            assert crossing or result.stats.accepted == result.stats.proposed
            if length is not None:
                assert result.stats.rounds <= -(-len(result.tokens) // (length + 1)) + crossing

    def test_a_draft_with_one_wrong_id_a_block(self, fp32, prompts, expected):
        """What a draft says before its error is accepted, the error and what follows never."""
        params = SamplingParams(max_new_tokens=TOKENS)
        with serving(half_true(dict(zip(prompts, expected, strict=True)))) as fake:
            addresses = (fp32.target.address, fake.address)
            jobs = [(prompt, params) for prompt in prompts[::2]]
            results = run(generate_all(addresses, jobs, draft_length=5))
        assert [result.token_ids for result in results] == expected[::2]
        assert all(result.stats.accepted < result.stats.proposed for result in results)

    @pytest.mark.parametrize("kind", [*PROPOSERS, "none"])
    def test_sync_client(self, fp32, prompts, expected, kind):
        """The client without asyncio says the same, from several draft lengths."""
        params = SamplingParams(max_new_tokens=TOKENS)
        for i, length in zip(range(1, len(prompts), 6), cycle([None, 2, 7])):
            with SyncSpeculativeClient(*fp32(kind), draft_length=length) as client:
                assert client.generate(prompts[i], params).token_ids == expected[i]
                with client.stream(prompts[i], params) as stream:
                    assert tuple(token.id for chunk in stream for token in chunk.tokens) == expected[i]

    def test_text_prompts(self, fp32, reference, heldout):
        """A prompt of text is the prompt of its token ids."""
        texts = [text for text in heldout if len(reference.ids(text)) < 100][:4]
        results = run(generate_all(fp32("model"), [(text, SamplingParams(max_new_tokens=8)) for text in texts]))
        for text, result in zip(texts, results, strict=True):
            assert result.prompt_token_ids == reference.ids(text)
            assert result.token_ids == reference.greedy(result.prompt_token_ids, 8)
            assert result.text == reference.text(result.prompt_token_ids, result.token_ids)

    @pytest.mark.parametrize("kind", [*PROPOSERS, "none"])
    def test_to_the_last_position(self, fp32, reference, prompts, kind):
        """A prompt may fill the slot but for a few positions, or none: one more token than positions is generated."""
        for room in (0, 1, 2, 5, 8):
            prompt = (prompts[-1] + prompts[13] + prompts[12])[: FP32_LENGTH - room]
            assert len(prompt) == FP32_LENGTH - room
            [result] = run(generate_all(fp32(kind), [(prompt, None)]))
            expected = reference.greedy(prompt, room + 1)
            assert result.token_ids == expected
            if reference.tokenizer.eos_token_id not in expected:
                assert result.finish_reason is FinishReason.CACHE_FULL


SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.0, top_k=40, seed=2**64 - 1),
    SamplingParams(temperature=0.9, top_p=0.9, seed=3),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.8, seed=4),
    SamplingParams(temperature=4.0, seed=2**63),
]


def sampled(params, **changes):
    """The parameters with a bound on the output."""
    return SamplingParams(**{**{name: getattr(params, name) for name in SamplingParams.__slots__}, **changes})


@pytest.fixture(scope="module")
def jobs(prompts):
    """One prompt for each way to sample. One output crosses `BORDER`, another the end of the draft's cache."""
    chosen = [prompts[0], prompts[3], prompts[7], prompts[8], prompts[10], prompts[13]]
    lengths = [16, 16, 16, 16, 16, 30]
    return [
        (prompt, sampled(params, max_new_tokens=length))
        for prompt, params, length in zip(chosen, SAMPLING, lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(bf16_target, jobs):
    """What the target says to each job by itself."""
    return [result.token_ids for result in run(generate_all((bf16_target.address, "none"), jobs, at_once=1))]


class TestBf16EqualsItself:
    """In bf16, greedy and sampled with a seed, the output is that of the target without a draft."""

    @pytest.mark.parametrize("length", [0, *LENGTHS, None])
    @pytest.mark.parametrize("kind", PROPOSERS)
    def test_any_proposer_and_draft_length(self, bf16, jobs, alone, kind, length):
        """With a model draft at every draft length on every job; with the others on every second one."""
        some = slice(None) if kind == "model" else slice((length or 0) % 2, None, 2)
        results = run(generate_all(bf16(kind), jobs[some], at_once=3, draft_length=length))
        assert [result.token_ids for result in results] == alone[some]
        for result in results:
            check_provenance(result)

    def test_a_draft_that_is_right(self, bf16, jobs, alone):
        """Sampled tokens are accepted in whole blocks too."""
        outputs = {prompt: output for (prompt, _), output in zip(jobs, alone, strict=True)}
        with serving(prophet(outputs)) as fake:
            addresses = (bf16.target.address, fake.address)
            results = run(generate_all(addresses, jobs, at_once=1, draft_length=7))
        assert [result.token_ids for result in results] == alone
        for prompt, result in zip((prompt for prompt, _ in jobs), results, strict=True):
            crossing = len(prompt) <= BORDER < len(prompt) + len(result.tokens)
            assert result.stats.proposed > 0
            assert crossing or result.stats.accepted == result.stats.proposed

    def test_eight_clients_at_once(self, bf16, prompts):
        """Each of 8 clients gets what it gets alone, whatever the others do."""
        kinds = cycle(["model", "ngram", "none", "liar"])
        clients = [
            (bf16(kind), prompt, sampled(params, max_new_tokens=12 + 2 * n))
            for n, (kind, prompt, params) in enumerate(zip(kinds, prompts[6:14], cycle(SAMPLING)))
        ]
        check_concurrent(clients)

    def test_more_clients_than_slots(self, bf16, prompts):
        """Those who wait for a slot get what they get alone."""
        kinds = cycle(["model", "liar", "ngram"])
        check_concurrent(
            [
                (bf16(kind), prompt, sampled(params, max_new_tokens=8 + n))
                for n, (kind, prompt, params) in enumerate(zip(kinds, prompts[:12], cycle(SAMPLING)))
            ]
        )

    def test_twelve_clients_on_four_slots(self, fp32, prompts):
        """The same in fp32, where three of them share each slot."""
        kinds = cycle(["model", "liar", "ngram", "none"])
        check_concurrent(
            [
                (fp32(kind), prompt, sampled(params, max_new_tokens=6 + n))
                for n, (kind, prompt, params) in enumerate(zip(kinds, prompts[:12], cycle(SAMPLING)))
            ]
        )


def check_concurrent(clients):
    """Each (addresses, prompt, params) gets the same from a client of its own, alone and with all at once."""

    async def one(addresses, prompt, params):
        async with SpeculativeClient(*addresses) as client:
            return (await client.generate(prompt, params)).token_ids

    async def one_by_one():
        return [await one(*client) for client in clients]

    async def together():
        return await asyncio.gather(*(one(*client) for client in clients))

    assert run(together()) == run(one_by_one())


class TestSeeds:
    """The seed decides what is sampled, and nothing else does."""

    def test_seeds(self, bf16, prompts):
        """The same seed repeats the output, also for another client; another seed changes it; greedy ignores it."""
        prompt = prompts[8]

        def params(seed, temperature=2.0):
            return SamplingParams(temperature=temperature, seed=seed, max_new_tokens=24)

        async def check():
            async with SpeculativeClient(*bf16("model")) as one, SpeculativeClient(*bf16("ngram")) as other:
                first = await one.generate(prompt, params(1))
                again = await one.generate(prompt, params(1))
                elsewhere = await other.generate(prompt, params(1))
                assert first.token_ids == again.token_ids == elsewhere.token_ids
                different = await asyncio.gather(*(one.generate(prompt, params(seed)) for seed in (0, 2, 3, 2**63)))
                assert len({first.token_ids, *(result.token_ids for result in different)}) == 5
                unset = await one.generate(prompt, params(None))
                assert unset.token_ids == different[0].token_ids
                greedy = await asyncio.gather(*(one.generate(prompt, params(seed, 0.0)) for seed in (1, 2)))
                assert greedy[0].token_ids == greedy[1].token_ids

        run(check())
