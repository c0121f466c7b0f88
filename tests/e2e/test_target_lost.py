"""A target that is killed takes no token with it: each generation goes on where it stood, with the same tokens."""

from __future__ import annotations

import asyncio
import random
import shutil

import pytest
from safetensors.torch import load_file, save_file

from specpair import SamplingParams, SpeculativeClient, UnavailableError

from ..amounts import runs
from .conftest import BF16_LENGTH, FP32_LENGTH
from .processes import DEMO, UNHURRIED, run
from .test_turns import TEMPLATE

TOKENS = 320
GREEDY = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, temperature=0.9, top_p=0.95, seed=11, logprobs=2)
# The target goes on by itself without a draft, whoever reads; so those that wait for the others have one.
WAITING = [("model", GREEDY), ("model", SAMPLED)]
RUNNING = [("none", GREEDY), ("none", SAMPLED)]
# An accident comes behind fewer tokens.
LATEST = 100
# Seconds that stand for "comes back": a target loads its model on a busy machine.
PATIENCE = 180.0


@pytest.fixture(scope="module")
def prompt(prompts):
    """Not too long for so many tokens."""
    return prompts[7]


@pytest.fixture(scope="module")
def mortal(launch):
    """The demo target in bf16, at an address that it keeps when it is killed and started again."""
    return launch("target", f"--model={DEMO / 'target'}", "--slots=4", f"--max-length={BF16_LENGTH}")


@pytest.fixture
def victim(mortal):
    """That target, alive."""
    if not mortal.alive:
        mortal.restart()
    assert mortal.address
    return mortal


@pytest.fixture(scope="module")
def conversing(launch, tmp_path_factory):
    """The demo target in fp32 with a chat template, to be killed too."""
    model = tmp_path_factory.mktemp("conversing") / "target"
    shutil.copytree(DEMO / "target", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return launch("target", f"--model={model}", "--dtype=fp32", "--slots=3", f"--max-length={FP32_LENGTH}")


@pytest.fixture(scope="module")
def expected(mortal, prompt):
    """What the target says undisturbed, for both parameters."""

    async def alone():
        async with SpeculativeClient(mortal.address, "none") as client:
            return {params: await client.generate(prompt, params) for params in (GREEDY, SAMPLED)}

    return run(alone())


def said(result):
    """What must be the same: ids, the text of each token, log probabilities, and why it ended."""
    return [(token.id, token.text, token.logprobs) for token in result.tokens], result.text, result.finish_reason


async def interrupted(client, prompt, params, after, accident):
    """The result of a generation in which an accident happens behind so many tokens."""
    async with client.stream(prompt, params) as stream:
        async for chunk in stream:
            if chunk.finish_reason is None and len(stream.tokens) >= after and accident is not None:
                await accident()
                accident = None
    assert accident is None, "the accident came too late to matter"
    return stream.result


async def all_interrupted(addresses, draft, prompt, accident, chance):
    """The results of all cases at the same time, with one accident in the middle of all of them."""
    ready, happened = asyncio.Barrier(len(WAITING) + 1), asyncio.Event()
    running = len(RUNNING)

    async def wait():
        await ready.wait()
        await happened.wait()

    async def run_on():
        nonlocal running
        running -= 1
        if running == 0:
            await asyncio.to_thread(accident)
            happened.set()

    async def generate(kind, params, middle):
        address = draft.address if kind == "model" else kind
        options = {"resume_timeout": PATIENCE, "draft_timeout": UNHURRIED}
        async with SpeculativeClient(addresses, address, **options) as client:
            return await interrupted(client, prompt, params, chance.randrange(LATEST), middle)

    async with asyncio.TaskGroup() as together:
        tasks = [together.create_task(generate(*case, wait)) for case in WAITING]
        await ready.wait()
        tasks += [together.create_task(generate(*case, run_on)) for case in RUNNING]
    return [task.result() for task in tasks]


def check(results, expected):
    """Each went on, as if nothing had happened."""
    for (kind, params), result in zip(WAITING + RUNNING, results, strict=True):
        assert said(result) == said(expected[params])
        assert result.stats.resumes == 1
        assert result.stats.output_tokens == TOKENS
        assert (result.stats.proposer, result.stats.proposer_changes) == (kind, ())


@pytest.mark.parametrize("seed", range(runs(2)))
def test_killed_and_started_again(victim, draft, prompt, expected, seed):
    """At random tokens of greedy and sampled generations, with a draft model and without: the tokens, the texts and
    the log probabilities are those of the undisturbed run."""

    def accident():
        victim.kill()
        victim.restart()

    chance = random.Random(seed)
    check(run(all_interrupted(victim.address, draft, prompt, accident, chance), within=2 * PATIENCE), expected)
    assert victim.address
    victim.wait_until_free()


def test_another_target_takes_over(victim, fp32_target, bf16, prompt, expected, caplog):
    """At once, in the middle of all generations; one that runs something else is passed over."""
    addresses = ",".join((victim.address, fp32_target.address, bf16.target.address))
    check(run(all_interrupted(addresses, bf16.draft, prompt, victim.kill, random.Random(7))), expected)
    assert f"the target at {fp32_target.address} has dtype fp32 instead of bf16" in caplog.text


def test_sessions(conversing, draft):
    """A conversation whose target is killed in its second turn, and a session of text that is between two turns then:
    all turns are those of undisturbed sessions, the later ones included."""
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    chats = [[{"role": "user", "content": content}] for content in ("Open a file.", "Read its lines.", "Close it.")]
    texts = ["import os\n", "\n\ndef main():", "\n    return"]

    async def talk(accident=None):
        results = []
        async with (
            SpeculativeClient(conversing.address, draft.address, resume_timeout=PATIENCE) as client,
            SpeculativeClient(conversing.address, "none", resume_timeout=PATIENCE) as other,
            client.session() as chat,
            other.session() as text,
        ):
            for messages, words in zip(chats, texts, strict=True):
                async with chat.stream(messages, params) as stream:
                    async for chunk in stream:
                        if results and accident is not None and len(stream.tokens) > 15:
                            assert chunk.finish_reason is None
                            await asyncio.to_thread(accident)
                            accident = None
                results += [stream.result, await text.generate(words, params)]
        return results

    def accident():
        conversing.kill()
        conversing.restart()

    undisturbed = run(talk())
    results = run(talk(accident), within=2 * PATIENCE)
    for result, expected in zip(results, undisturbed, strict=True):
        assert result.prompt_token_ids == expected.prompt_token_ids
        assert said(result) == said(expected)
    assert [result.stats.resumes for result in results] == [0, 0, 1, 1, 0, 0]
    # Behind the accident both sessions are on the cache again.
    assert all(result.stats.cached_tokens > 0 for result in results[4:])
    conversing.wait_until_free()


def test_another_model_at_the_same_place(launch, tmp_path, prompt, caplog):
    """A target that is started again with other weights under the same name: a generation that was under way ends with
    the typed error, and one that begins later is the new model's, also where the client was idle meanwhile."""
    model = tmp_path / "target"
    shutil.copytree(DEMO / "target", model)
    target = launch("target", f"--model={model}", "--slots=2", f"--max-length={BF16_LENGTH}")

    def retrained():
        weights = load_file(model / "model.safetensors")
        save_file(
            {name: tensor * 1.25 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"}
        )
        target.kill()
        target.restart()
        assert target.address

    async def generations():
        async with SpeculativeClient(target.address, "none", connect_timeout=PATIENCE) as client:
            before = await client.generate(prompt, GREEDY)
            await asyncio.to_thread(retrained)
            after = await client.generate(prompt, GREEDY)
            async with SpeculativeClient(target.address, "none") as fresh:
                assert said(after) == said(await fresh.generate(prompt, GREEDY))
            with pytest.raises(UnavailableError, match="has other weights") as changed:
                await interrupted(client, prompt, GREEDY, 20, lambda: asyncio.to_thread(retrained))
            assert changed.value.reason == "TARGET_CHANGED"
        return before, after

    before, after = run(generations(), within=2 * PATIENCE)
    assert before.token_ids != after.token_ids
    assert "has other weights, software or hardware; new sessions begin with that" in caplog.text
