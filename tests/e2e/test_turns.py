"""Sessions of several turns against real services, and what tells about a model: explanations and memory plans."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
import subprocess

import pytest

from specpair import (
    AcceptanceRule,
    FinishReason,
    InvalidRequestError,
    SamplingParams,
    SpeculativeClient,
    SyncSpeculativeClient,
    UnavailableError,
)

from .conftest import FP32_LENGTH
from .processes import DEMO, UNHURRIED, environment, run, script

TOKENS = 12
KINDS = ["model", "ngram", "none"]
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=TOKENS, ignore_eos=True),
    "sampled": SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, temperature=1.0, top_p=0.95, seed=5),
    "penalized": SamplingParams(max_new_tokens=TOKENS, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.5),
}
LATER_TURNS = ["\n\n\nclass Stack:\n", (17, 300, 42), "    def push(self, item):", (9,)]
TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}:\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}


def specpair(*arguments, timeout=180):
    """The output of the command, which must succeed."""
    done = subprocess.run(
        [script("specpair"), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
        env=environment(COLUMNS="160"),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


async def fresh(target, prompt, params):
    """What the target says to a prompt by itself."""
    async with SpeculativeClient(target, "none") as client:
        return await client.generate(prompt, params)


class TestTurns:
    """A turn is what a fresh session says that is given everything before it, and computes only what is new."""

    @pytest.mark.parametrize("sampling", SAMPLING)
    @pytest.mark.parametrize("kind", KINDS)
    def test_text_and_ids(self, fp32, prompts, kind, sampling):
        """With every proposer, greedy, sampled and with penalties, for prompts of text and of ids."""
        target, draft = fp32(kind)
        params = SAMPLING[sampling]

        async def check():
            log = ()
            client = SpeculativeClient(target, draft, draft_timeout=UNHURRIED)
            async with client, client.session() as session:
                for prompt in (prompts[7], *LATER_TURNS):
                    result = await session.generate(prompt, params)
                    if isinstance(prompt, tuple):
                        assert result.prompt_token_ids == log + prompt
                    assert result.prompt_token_ids[: len(log)] == log
                    assert result.stats.cached_tokens == max(len(log) - 1, 0)
                    assert result.stats.prompt_tokens == len(result.prompt_token_ids) > len(log)
                    assert (result.stats.proposer, result.stats.proposer_changes) == (kind, ())
                    alone = await fresh(target, result.prompt_token_ids, params)
                    assert result.token_ids == alone.token_ids
                    assert result.text == alone.text
                    log = result.prompt_token_ids + result.token_ids
                    assert session.token_ids == log
                assert fp32.target.info().slots_in_use == 1

        run(check())
        fp32.target.wait_until_free()

    def test_the_first_text_is_the_tokenizers(self, fp32, reference):
        """Texts of later turns are tokenized by themselves and stand behind everything before them."""
        texts = ["import os\n", "\n\ndef main():", "\n    return"]

        async def check():
            log = ()
            async with SpeculativeClient(*fp32("model")) as client, client.session() as session:
                for text in texts:
                    result = await session.generate(text, SAMPLING["greedy"])
                    assert result.prompt_token_ids == log + reference.ids(text)
                    log = result.prompt_token_ids + result.token_ids

        run(check())

    @pytest.mark.parametrize("kind", KINDS)
    def test_however_a_turn_ends(self, fp32, prompts, reference, kind):
        """Behind a stop string or a stop id inside an accepted block, and up to the slot's last position."""
        target, draft = fp32(kind)
        prompt = prompts[8]
        expected = reference.greedy(prompt, TOKENS)
        text = reference.text(prompt, expected)
        middle = len(text) // 2
        endings = [
            (FinishReason.STOP_STRING, SamplingParams(stop=(text[middle : middle + 3],), max_new_tokens=TOKENS)),
            (FinishReason.STOP_TOKEN, SamplingParams(stop_token_ids=(expected[5],), max_new_tokens=TOKENS)),
        ]

        async def check():
            async with SpeculativeClient(target, draft, draft_length=4) as client:
                for reason, params in endings:
                    async with client.session() as session:
                        first = await session.generate(prompt, params)
                        assert first.finish_reason is reason
                        assert expected[: len(first.token_ids)] == first.token_ids
                        second = await session.generate((17, 300), SAMPLING["greedy"])
                        assert second.prompt_token_ids == prompt + first.token_ids + (17, 300)
                        assert second.stats.cached_tokens >= len(prompt + first.token_ids) - 1
                        alone = await fresh(target, second.prompt_token_ids, SAMPLING["greedy"])
                        assert second.token_ids == alone.token_ids
                        rest = FP32_LENGTH - len(session.token_ids) - 3
                        last = await session.generate((prompt * 100)[:rest], SamplingParams(ignore_eos=True))
                        assert last.finish_reason is FinishReason.CACHE_FULL
                        assert len(last.token_ids) == 4
                        alone = await fresh(target, last.prompt_token_ids, SamplingParams(ignore_eos=True))
                        assert last.token_ids == alone.token_ids

        run(check())

    def test_sessions_at_once(self, fp32, prompts):
        """Each on its own slot, turn by turn beside the others and one-shot calls between."""

        async def check():
            async with contextlib.AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(SpeculativeClient(*fp32(kind))) for kind in KINDS]
                sessions = [await stack.enter_async_context(client.session()) for client in clients]
                for number in range(3):
                    params = SAMPLING[[*SAMPLING][number]]
                    own = [prompts[number + offset] for offset in range(len(sessions))]
                    results = await asyncio.gather(
                        *(session.generate(prompt, params) for session, prompt in zip(sessions, own, strict=True)),
                        clients[1].generate(prompts[9], params),
                    )
                    for result in results:
                        alone = await fresh(fp32.target.address, result.prompt_token_ids, params)
                        assert result.token_ids == alone.token_ids

        run(check())

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_turn_cut_short_frees_the_slot(self, fp32, prompts, kind):
        """At once, with the session still open; whoever goes on is told."""

        async def check():
            async with SpeculativeClient(*fp32(kind)) as client, client.session() as session:
                await session.generate(prompts[5], SAMPLING["greedy"])
                async with session.stream((3,), SamplingParams(ignore_eos=True)) as stream:
                    await anext(stream)
                fp32.check()
                with pytest.raises(UnavailableError, match="a turn was left before its end"):
                    await session.generate((3,), SAMPLING["greedy"])

        run(check())

    def test_what_the_target_refuses_is_named(self, fp32, prompts):
        """An empty prompt, parameters out of bounds, a conversation behind something else."""
        refused = [
            ("", SamplingParams(), "extend.prompt.text"),
            ((), SamplingParams(), "extend.prompt.token_ids"),
            ((1,), SamplingParams(temperature=-1.0), "extend.sampling.temperature"),
            ((1,) * FP32_LENGTH, SamplingParams(), "extend.prompt.token_ids"),
            ([{"role": "user", "content": "hi"}], SamplingParams(), "extend.prompt.chat"),
        ]
        with SyncSpeculativeClient(*fp32("ngram")) as client:
            for prompt, params, field in refused:
                with client.session() as session:
                    session.generate(prompts[5], SAMPLING["greedy"])
                    with pytest.raises(InvalidRequestError) as error:
                        session.generate(prompt, params)
                    assert error.value.field == field
                    with pytest.raises(UnavailableError, match="a turn failed"):
                        session.generate((1,), SAMPLING["greedy"])


@pytest.fixture(scope="module")
def chat_target(launch, tmp_path_factory):
    """The demo target in fp32 with a chat template."""
    model = tmp_path_factory.mktemp("chat") / "target"
    shutil.copytree(DEMO / "target", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    service = launch("target", f"--model={model}", "--dtype=fp32", "--slots=2", f"--max-length={FP32_LENGTH}")
    yield service
    service.stop()


class TestConversations:
    """A conversation goes on with its new messages, and equals a fresh session given all of it."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_turns(self, chat_target, draft, kind):
        """Rendered as a whole with the target's template, answers included, on the cache of what came before."""
        params = SamplingParams(max_new_tokens=24, stop=("\n\n",))
        news = [
            [{"role": "system", "content": "Answer in Python."}, {"role": "user", "content": "Open a file."}],
            [{"role": "user", "content": "Now read its lines."}],
            [{"role": "user", "content": "And close it."}],
        ]

        async def check():
            address = draft.address if kind == "model" else kind
            pair = SpeculativeClient(chat_target.address, address, draft_timeout=UNHURRIED)
            async with pair as client, client.session() as session:
                assert (await client.info())[0].chat
                whole = []
                for number, messages in enumerate(news):
                    result = await session.generate(messages, params)
                    whole += messages
                    alone = await fresh(chat_target.address, whole, params)
                    assert result.prompt_token_ids == alone.prompt_token_ids
                    assert result.token_ids == alone.token_ids
                    assert result.text == alone.text
                    assert (0 < result.stats.cached_tokens < result.stats.prompt_tokens) == (number > 0)
                    assert result.stats.proposer_changes == ()
                    whole.append({"role": "assistant", "content": result.text})

        run(check())
        chat_target.wait_until_free()
        draft.wait_until_free()

    def test_the_template_decides(self, chat_target, reference):
        """What is tokenized is the template's text."""
        messages = [{"role": "user", "content": "Open a file."}]

        async def check():
            async with SpeculativeClient(chat_target.address, "none") as client:
                return await client.tokenize(messages)

        assert run(check()) == reference.ids("# user:\nOpen a file.\n# assistant:\n")


class TestExplanations:
    """Why each id of a proposal was accepted or not, in the target's own figures."""

    def test_a_proposal_half_right(self, fp32, prompts, reference):
        """What is right is accepted, the first wrong id rejected, what follows not reached."""
        prompt = prompts[8]
        truth = reference.greedy(prompt, 5)
        proposal = [*truth[:2], truth[2] ^ 1, truth[3]]

        async def check():
            async with SpeculativeClient(fp32.target.address, "none") as client:
                explained = await client.explain(prompt, proposal)
                logprobs = await client.generate(prompt, SamplingParams(max_new_tokens=3, logprobs=5))
                return explained, [token.logprobs for token in logprobs.tokens]

        explained, logprobs = run(check())
        assert [one.position for one in explained] == [len(prompt) + row for row in range(5)]
        assert [one.proposed_token_id for one in explained] == [*proposal, None]
        assert [one.accepted for one in explained] == [True, True, False, False, False]
        assert tuple(one.target_token_id for one in explained[:3]) == truth[:3]
        assert {one.draft_prob for one in explained} == {None}
        assert all(one.top2_margin > 0 for one in explained)
        assert [one.reason.partition(":")[0] for one in explained] == [
            *["accepted", "accepted", "rejected", "not reached"],
            "not reached",
        ]
        for one, known in zip(explained[:2], logprobs, strict=False):
            assert math.isclose(one.target_prob, math.exp(known.chosen), abs_tol=1e-4)
            best, second = (logprob for _, logprob in known.top[:2])
            assert math.isclose(one.top2_margin, best - second, abs_tol=1e-3)
        assert explained[2].target_prob < math.exp(logprobs[2].chosen)

    def test_the_command(self, fp32, prompts, reference):
        """Texts and ids, and what the draft proposes with its own probabilities under the rejection rule."""
        prompt = "import os\nimport sys\n\n\ndef main():\n    "
        ids = reference.ids(prompt)
        truth = reference.greedy(ids, 4)
        text = reference.text(ids, truth)
        common = ["explain", prompt, f"--target={fp32.target.address}", "--json"]
        [line] = specpair(*common, f"--proposal={text}").splitlines()
        by_text = json.loads(line)
        if reference.ids(prompt + text) == ids + truth:
            assert [one["proposed_token_id"] for one in by_text["positions"]] == [*truth, None]
            assert by_text["accepted"] == 4
        by_ids = json.loads(specpair(*common, f"--proposal-ids={','.join(map(str, truth))}"))
        assert (by_ids["proposed"], by_ids["accepted"]) == (4, 4)
        assert "".join(one["proposed_text"] for one in by_ids["positions"][:-1]) == text
        draft = [f"--draft={fp32.draft.address}", "--draft-length=3"]
        sampled = json.loads(specpair(*common, *draft, "--rule=rejection", "--temperature=1", "--seed=3"))
        assert sampled["proposed"] == 3
        for one in sampled["positions"][:-1]:
            assert 0 < one["draft_prob"] <= 1
        assert "chance of acceptance" in sampled["positions"][0]["reason"]
        greedy = json.loads(specpair(*common, *draft))
        assert [one["draft_prob"] for one in greedy["positions"]] == [None] * 4
        table = specpair(*common[:-1], *draft)
        assert "verdict" in table
        assert str(len(ids)) in table


def sampled(rule=AcceptanceRule.REJECTION, seed=1):
    """Draws from the whole distribution."""
    return SamplingParams(max_new_tokens=32, ignore_eos=True, temperature=1.0, seed=seed, rule=rule)


class TestRejectionRule:
    """Leviathan's rule through the whole pair: the target's distribution, the same draw for the same draft."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_seed_and_draft_repeat_the_output(self, fp32, prompts, kind):
        """The draft length is part of the draft; another seed is another draw."""

        async def check():
            async with SpeculativeClient(*fp32(kind), draft_length=3, draft_timeout=UNHURRIED) as client:
                results = [await client.generate(prompts[8], sampled(seed=seed)) for seed in (1, 1, 2, 3)]
                assert results[0].token_ids == results[1].token_ids
                assert len({result.token_ids for result in results}) == 3
                assert all(result.stats.proposer_changes == () for result in results)
                assert any(result.stats.proposed for result in results) == (kind != "none")

        run(check())

    def test_it_accepts_about_as_often_as_the_coupled_rule(self, fp32, prompts):
        """1 - TV of what it is offered, against at least (1 - TV) / (1 + TV); the outputs, being draws, differ."""

        async def rate(rule):
            async with SpeculativeClient(*fp32("model"), draft_length=3) as client:
                jobs = [(prompt, sampled(rule, seed)) for seed, prompt in enumerate(prompts[4:10])]
                stats = [(await client.generate(*job)).stats for job in jobs]
            return sum(one.accepted for one in stats) / sum(one.proposed for one in stats)

        coupled, rejection = run(rate(AcceptanceRule.COUPLED)), run(rate(AcceptanceRule.REJECTION))
        assert 0.05 < rejection < 1
        assert rejection > coupled / 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_greedy_is_greedy(self, fp32, prompts, reference, kind):
        """At temperature 0 both rules say what transformers says."""
        params = SamplingParams(max_new_tokens=TOKENS, rule=AcceptanceRule.REJECTION)

        async def check():
            async with SpeculativeClient(*fp32(kind)) as client, client.session() as session:
                one_shot = await client.generate(prompts[8], params)
                return one_shot, await session.generate(prompts[8], params)

        for result in run(check()):
            assert result.token_ids == reference.greedy(prompts[8], TOKENS)

    def test_turns(self, fp32, prompts):
        """The rule may change from turn to turn, on both streams."""

        async def check():
            async with SpeculativeClient(*fp32("model")) as client, client.session() as session:
                await session.generate(prompts[8], sampled())
                coupled = await session.generate((3,), SAMPLING["sampled"])
                again = await session.generate((3,), sampled())
                assert len(again.token_ids) == 32
                alone = await fresh(fp32.target.address, coupled.prompt_token_ids, SAMPLING["sampled"])
                assert coupled.token_ids == alone.token_ids

        run(check())


def test_plan_of_mistral_7b(tmp_path):
    """From its config alone: the figures of transformers' guide for Mistral-7B, which are GiB, within 3 percent."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    printed = json.loads(specpair("plan", str(tmp_path), "--gpu=24GB", "--max-length=4096", "--json"))
    weights = {one["name"]: one["weights"] / 2**30 for one in printed["formats"]}
    assert math.isclose(weights["bf16"], 13.74, rel_tol=0.03)
    assert math.isclose(weights["int8"], 6.87, rel_tol=0.03)
    assert weights["nf4"] < weights["int8"] < weights["bf16"] < weights["fp32"]
    # 32 layers of keys and values of 8 heads of 128 numbers of 2 bytes at each position
    slots = {one["name"]: one["slot"] for one in printed["formats"]}
    assert slots["bf16"] == 32 * 2 * 8 * 128 * 2 * 4096
    fits = printed["fits"]["24000000000"]
    assert fits["fp32"] == 0 < fits["bf16"] < fits["int8"] < fits["nf4"]
    table = specpair("plan", str(tmp_path), "--gpu=24GB", "--max-length=4096")
    assert "24 GB" in table
    assert f"{weights['bf16']:.2f}" in table
