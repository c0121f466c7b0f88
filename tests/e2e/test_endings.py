"""What ends a generation, over the wire: the right tokens, the right text, the right reason, and nothing behind it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from specpair import FinishReason, SamplingParams, SpeculativeClient

from .conftest import BORDER, FP32_LENGTH
from .drafts import prophet, serving
from .processes import run

TOKENS = 24


@dataclass(frozen=True)
class Known:
    """An output of the target alone: its ids, and the text in front of each of them and behind the last."""

    prompt: tuple[int, ...]
    sampling: dict
    ids: tuple[int, ...]
    text: str
    offsets: tuple[int, ...]

    def params(self, **changes):
        """The parameters of this output, with other ends."""
        return SamplingParams(**{**self.sampling, "max_new_tokens": TOKENS, "ignore_eos": True, **changes})

    def first_occurrences(self):
        """Indices of the ids that did not occur before."""
        return [i for i, id_ in enumerate(self.ids) if id_ not in self.ids[:i]]


@pytest.fixture(scope="module", params=[{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def known(request, bf16_target, reference, prompts):
    """The output with the most different tokens among a few prompts."""
    sampling = request.param
    params = SamplingParams(**sampling, max_new_tokens=TOKENS, ignore_eos=True)

    async def candidates():
        async with SpeculativeClient(bf16_target.address, "none") as client:
            inside = [prompt for prompt in prompts if not len(prompt) <= BORDER < len(prompt) + TOKENS]
            return await asyncio.gather(*(client.generate(prompt, params) for prompt in inside[4:20:2]))

    best = max(run(candidates()), key=lambda result: len(set(result.token_ids)))
    ids, prompt = best.token_ids, best.prompt_token_ids
    assert len(set(ids)) >= 8, "the demo target only repeats itself"
    offsets = tuple(len(reference.text(prompt, ids[:n])) for n in range(len(ids) + 1))
    return Known(prompt, sampling, ids, reference.text(prompt, ids), offsets)


@pytest.fixture(scope="module")
def knowing(known):
    """A draft that proposes exactly the known output, so that every end lies inside an accepted block."""
    with serving(prophet({known.prompt: known.ids})) as fake:
        yield fake


async def stream(addresses, prompt, params, **options):
    """A result, after checking that its chunks make it up and that nothing comes behind the last."""
    async with SpeculativeClient(*addresses, **options) as client:
        async with client.stream(prompt, params) as chunks:
            seen = [chunk async for chunk in chunks]
        result = chunks.result
    assert "".join(chunk.text for chunk in seen) == "".join(token.text for token in result.tokens) == result.text
    assert tuple(token for chunk in seen for token in chunk.tokens) == result.tokens
    assert [chunk.finish_reason for chunk in seen] == [None] * (len(seen) - 1) + [result.finish_reason]
    return result


def drafts(pair, knowing):
    """Ways to be drafted: by one who knows, by the model, by prompt lookup, not at all."""
    return [(pair.target.address, knowing.address), pair("model"), pair("ngram"), pair("none")]


def test_stop_token_inside_a_block(bf16, known, knowing):
    """A stop token anywhere in an accepted block ends the output with itself."""

    async def check():
        for i in known.first_occurrences():
            params = known.params(stop_token_ids=[known.ids[i]])
            result = await stream((bf16.target.address, knowing.address), known.prompt, params, draft_length=7)
            assert result.token_ids == known.ids[: i + 1]
            assert result.finish_reason is FinishReason.STOP_TOKEN
            assert result.text == known.text[: known.offsets[i + 1]]
            assert result.stats.accepted == i + 1 - (i + 1) // 8

    run(check())


def test_stop_token_whoever_drafts(bf16, known, knowing):
    """The first of several stop tokens counts, for every proposer."""
    several = known.first_occurrences()[5:]
    params = known.params(stop_token_ids=[known.ids[i] for i in reversed(several)])

    async def check():
        for addresses in drafts(bf16, knowing):
            result = await stream(addresses, known.prompt, params)
            assert result.token_ids == known.ids[: several[0] + 1]
            assert result.finish_reason is FinishReason.STOP_TOKEN

    run(check())


def stop_strings(known):
    """Texts of the output that lie across token borders and do not occur earlier: (stop, where it starts)."""
    for border in known.offsets[1:-1]:
        for before, behind in ((1, 1), (1, 2), (2, 1), (3, 3), (1, 8), (8, 1)):
            stop = known.text[max(border - before, 0) : border + behind]
            if len(stop) == before + behind and known.text.find(stop) == border - before:
                yield stop, border - before
                break


def test_stop_string_across_blocks(bf16, known, knowing, reference):
    """A stop string ends the output with the token that completes it, and the text in front of it.

    With draft length k every (k + 1)th token border is one between blocks, so that each string lies across a border
    of blocks for some k and inside a block for others.
    """
    stops = list(stop_strings(known))
    assert len(stops) >= 5

    async def check():
        for n, (stop, start) in enumerate(stops[:12]):
            length = next(i for i, offset in enumerate(known.offsets) if offset >= start + len(stop))
            for k in (n % 3, 7):
                result = await stream(
                    (bf16.target.address, knowing.address), known.prompt, known.params(stop=[stop]), draft_length=k
                )
                assert result.finish_reason is FinishReason.STOP_STRING
                assert result.stop_string == stop
                assert result.text == known.text[:start]
                assert result.token_ids == known.ids[:length]

    run(check())


def test_stop_string_whoever_drafts(bf16, known, knowing):
    """The stop string that is complete first counts, for every proposer; one that never comes holds nothing back."""
    stops = list(stop_strings(known))
    (first, start), (second, _) = stops[2], stops[4]
    never = known.text[-1] + "\u2603"

    async def check():
        for addresses in drafts(bf16, knowing):
            result = await stream(addresses, known.prompt, known.params(stop=[never, second, first]))
            assert (result.finish_reason, result.stop_string) == (FinishReason.STOP_STRING, first)
            assert result.text == known.text[:start]
            result = await stream(addresses, known.prompt, known.params(stop=[never]))
            assert result.finish_reason is FinishReason.MAX_NEW_TOKENS
            assert (result.text, result.token_ids) == (known.text, known.ids)

    run(check())


def test_max_new_tokens_inside_a_block(bf16, known, knowing):
    """The output has exactly so many tokens, wherever in a block the last one stands."""

    async def check():
        for count in range(1, 18):
            result = await stream(
                (bf16.target.address, knowing.address),
                known.prompt,
                known.params(max_new_tokens=count),
                draft_length=7,
            )
            assert result.token_ids == known.ids[:count]
            assert result.finish_reason is FinishReason.MAX_NEW_TOKENS
            assert result.text == known.text[: known.offsets[count]]
            assert result.stats.rounds == -(-count // 8)

    run(check())


def test_which_end_goes_first(bf16, known, knowing):
    """When the last allowed token is a stop token or completes a stop string, that is the reason."""
    i = next(i for i in known.first_occurrences() if i >= 4)
    stop, start = next((stop, start) for stop, start in stop_strings(known) if start >= known.offsets[3])
    length = next(i for i, offset in enumerate(known.offsets) if offset >= start + len(stop))

    async def check():
        for addresses in drafts(bf16, knowing):
            params = known.params(stop_token_ids=[known.ids[i]], max_new_tokens=i + 1)
            result = await stream(addresses, known.prompt, params)
            assert (result.token_ids, result.finish_reason) == (known.ids[: i + 1], FinishReason.STOP_TOKEN)
            params = known.params(stop=[stop], max_new_tokens=length)
            result = await stream(addresses, known.prompt, params)
            assert (result.token_ids, result.finish_reason) == (known.ids[:length], FinishReason.STOP_STRING)
            assert result.text == known.text[:start]

    run(check())


def test_full_cache(fp32, reference, prompts):
    """A session ends with one token more than its slot has positions, also when the draft would go on."""
    everything = (prompts[-1] + prompts[13] + prompts[12])[:FP32_LENGTH]
    params = SamplingParams(ignore_eos=True)

    async def check():
        for room in (0, 1, 3, 7, 8, 12):
            prompt = everything[: FP32_LENGTH - room]
            alone = await stream(fp32("none"), prompt, params)
            assert len(alone.token_ids) == room + 1
            assert alone.finish_reason is FinishReason.CACHE_FULL
            with serving(prophet({prompt: alone.token_ids + (1,) * 20})) as knowing:
                for length in (2, 7):
                    result = await stream((fp32.target.address, knowing.address), prompt, params, draft_length=length)
                    assert result.token_ids == alone.token_ids
                    assert result.finish_reason is FinishReason.CACHE_FULL
                    assert result.text == alone.text

    run(check())


@pytest.mark.parametrize("seed", range(4))
def test_text_of_anything(bf16, reference, prompts, seed):
    """However wild the tokens, half characters included, the deltas add up to what the tokenizer makes of them all."""
    params = SamplingParams(temperature=50.0, seed=seed, max_new_tokens=60, ignore_eos=True)
    prompt = prompts[6]

    async def check():
        result = await stream(bf16("model"), prompt, params)
        assert result.text == reference.text(prompt, result.token_ids)
        async with SpeculativeClient(*bf16("none")) as client:
            assert result.text in await client.detokenize([*prompt, *result.token_ids])

    run(check())
