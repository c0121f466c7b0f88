"""The official client against a gateway process, in front of the demo pair."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import urllib.error
import urllib.request

import openai
import pytest

from specpair import SamplingParams, SpeculativeClient

from ..e2e.processes import DEMO, Service, run, wait_for
from ..e2e.test_turns import TEMPLATE

KEY = "sk-0123456789abcdef"
MODEL = "demo"
PROMPT = "import os\nimport sys\n\n\ndef main():\n    "
MESSAGES = [{"role": "system", "content": "Answer in Python."}, {"role": "user", "content": "Open a file."}]
SLOTS, LENGTH = 2, 512
# Seconds that stand for "is not forgotten"; what is left of an endless answer takes less only when nothing else runs.
_FREE = 10
# Longer than any test reads on.
ENDLESS = {"max_tokens": 480, "extra_body": {"ignore_eos": True}}


class Gateway(Service):
    """A gateway process."""

    def __init__(self, log, *flags):
        super().__init__("gateway", log, "--listen=127.0.0.1:0", *flags, listen=False)

    @property
    def url(self):
        """Where OpenAI's API begins."""
        return f"http://{self.address}/v1"

    def requests(self):
        """Log lines of requests that have ended."""
        return [entry for entry in self.entries() if entry["event"] == "request"]

    def _healthy(self):
        self._check()
        try:
            with urllib.request.urlopen(f"http://{self._listening()}/health", timeout=30) as answer:
                return answer.status == 200
        except urllib.error.HTTPError:
            return False


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """Target with few slots and no queue, draft, and the gateway before them: all start at once."""
    place = tmp_path_factory.mktemp("gateway")
    model, keys = place / "target", place / "keys"
    shutil.copytree(DEMO / "target", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    keys.write_text(f"tests:{KEY}\n")
    keys.chmod(0o600)
    with contextlib.ExitStack() as stack:

        def start(service):
            stack.callback(service.stop)
            asking.callback(service.ask_to_stop)
            return service

        # Entered last: all are asked to stop before any is waited for.
        asking = contextlib.ExitStack()
        flags = ["--dtype=fp32", f"--slots={SLOTS}", "--queue=0", f"--max-length={LENGTH}"]
        target = start(Service("target", place / "target.log", f"--model={model}", *flags))
        draft_flags = [f"--model={DEMO / 'draft'}", "--slots=8", f"--max-length={LENGTH}"]
        draft = start(Service("draft", place / "draft.log", *draft_flags))
        with asking:
            flags = [f"--served-model-name={MODEL}", f"--api-keys={keys}"]
            addresses = [f"--target={target.address}", f"--draft={draft.address}"]
            yield target, start(Gateway(place / "gateway.log", *addresses, *flags)), draft


@pytest.fixture
def target(services):
    """The target, which is idle again after the test."""
    yield services[0]
    services[0].wait_until_free(_FREE)


@pytest.fixture
def gateway(services, target):
    """The gateway."""
    return services[1]


@pytest.fixture
def client(gateway):
    """OpenAI's client, which takes no second try."""
    with openai.OpenAI(base_url=gateway.url, api_key=KEY, max_retries=0) as opened:
        yield opened


def asynchronous(gateway):
    """The same for asyncio."""
    return openai.AsyncOpenAI(base_url=gateway.url, api_key=KEY, max_retries=0)


@pytest.fixture
def known(target):
    """What the client library says."""

    def generate(prompt, **params):
        async def once():
            async with SpeculativeClient(target.address, "none") as library:
                return await library.generate(prompt, SamplingParams(**params))

        return run(once())

    return generate


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}])
class TestTheSameText:
    """The output is the client library's, greedy and sampled, whole and in pieces."""

    def test_completion(self, client, known, sampling):
        """Of a text, and of its token ids."""
        expected = known(PROMPT, max_new_tokens=24, **sampling)
        request = {"model": MODEL, "max_tokens": 24, **sampling}
        for prompt in (PROMPT, list(expected.prompt_token_ids)):
            whole = client.completions.create(prompt=prompt, **request)
            assert whole.choices[0].text == expected.text
            assert whole.choices[0].finish_reason == "length"
            assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
            assert whole.usage.completion_tokens == 24
        stream = client.completions.create(prompt=PROMPT, stream=True, **request)
        assert "".join(piece.choices[0].text for piece in stream) == expected.text

    def test_chat(self, client, known, sampling):
        """With the target's template, and statistics at the end of the stream."""
        expected = known(MESSAGES, max_new_tokens=24, stop=("\n\n",), **sampling)
        request = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 24, "stop": "\n\n", **sampling}
        whole = client.chat.completions.create(**request)
        assert whole.choices[0].message.content == expected.text
        finish = "stop" if expected.stop_string else "length"
        assert whole.choices[0].finish_reason == finish
        stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **request)
        *pieces, last = stream
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
        assert pieces[-1].choices[0].finish_reason == finish
        assert last.usage.completion_tokens == len(expected.token_ids) == whole.usage.completion_tokens

    def test_asynchronous(self, gateway, known, sampling):
        """Both at once."""
        texts = (
            known(PROMPT, max_new_tokens=24, **sampling).text,
            known(MESSAGES, max_new_tokens=24, **sampling).text,
        )

        async def check():
            async with asynchronous(gateway) as client:
                request = {"model": MODEL, "max_tokens": 24, **sampling}

                async def streamed():
                    stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **request)
                    return "".join([piece.choices[0].delta.content or "" async for piece in stream])

                whole = client.completions.create(prompt=PROMPT, **request)
                completion, chat = await asyncio.gather(whole, streamed())
                return completion.choices[0].text, chat

        assert run(check()) == texts


class TestOptions:
    """What else may be asked for."""

    def test_several_choices(self, client, known):
        """Each is what its own seed says."""
        expected = [known(PROMPT, max_new_tokens=16, temperature=1.0, seed=seed).text for seed in (4, 5)]
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, n=2, seed=4)
        assert [choice.text for choice in answer.choices] == expected
        assert expected[0] != expected[1]

    def test_log_probabilities(self, client, known):
        """Are the target's, with texts and bytes of the tokens."""
        expected = known(PROMPT, max_new_tokens=8, logprobs=3)
        chosen = [token.logprobs.chosen for token in expected.tokens]
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3)
        said = answer.choices[0].logprobs
        assert said.token_logprobs == pytest.approx(chosen, abs=1e-3)
        assert "".join(said.tokens) == expected.text
        assert [len(top) for top in said.top_logprobs] == [3] * 8
        request = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        answer = client.chat.completions.create(model=MODEL, logprobs=True, top_logprobs=2, **request)
        content = answer.choices[0].logprobs.content
        assert b"".join(bytes(one.bytes) for one in content).decode() == answer.choices[0].message.content
        for one in content:
            assert (one.top_logprobs[0].token, one.top_logprobs[0].logprob) == (one.token, one.logprob)
            assert len(one.top_logprobs) == 2

    def test_prediction(self, client, known):
        """Comes in whole blocks as far as it is true, and the text is what it is without it."""
        expected = known(MESSAGES, max_new_tokens=64, ignore_eos=True)
        request = {"messages": MESSAGES, "max_tokens": 64, "temperature": 0, "extra_body": {"ignore_eos": True}}

        def predicting(content):
            prediction = {"type": "content", "content": content}
            answer = client.chat.completions.create(model=MODEL, prediction=prediction, **request)
            assert answer.choices[0].message.content == expected.text
            details = answer.usage.completion_tokens_details
            assert 64 > answer.usage.specpair["rounds"] > 0
            assert answer.usage.specpair["accepted"] >= details.accepted_prediction_tokens
            return details.accepted_prediction_tokens, details.rejected_prediction_tokens

        accepted, rejected = predicting(expected.text)
        assert accepted > 8
        assert rejected == 0
        accepted, rejected = predicting("raise SystemExit\n" * 4)
        assert rejected > 0

    def test_models(self, client):
        """By their given name."""
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL


class TestErrors:
    """Are the classes that OpenAI's client has for them."""

    def test_not_found(self, client):
        """A model that is not served."""
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="other", prompt="x")
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"temperature": -1}, "temperature"),
            ({"max_completion_tokens": 0}, "max_completion_tokens"),
            ({"stop": [""]}, "stop[0]"),
            ({"logit_bias": {"99999": 1}}, "logit_bias[99999]"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"messages": [{"role": "user", "content": "x y " * LENGTH}]}, "messages"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
        ],
    )
    def test_bad_request(self, client, fields, param):
        """Names what the caller called it, whoever found it."""
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **fields})
        assert caught.value.param == param

    def test_authentication(self, gateway):
        """Without a known key."""
        with (
            openai.OpenAI(base_url=gateway.url, api_key=f"{KEY}x", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            stranger.models.list()
        assert caught.value.code == "invalid_api_key"

    @pytest.mark.parametrize("stream", [False, True])
    def test_rate_limit(self, gateway, target, stream):
        """With all slots taken, and when to come back."""

        async def check():
            async with SpeculativeClient(target.address, "ngram") as library, contextlib.AsyncExitStack() as held:
                for _ in range(SLOTS):
                    session = await held.enter_async_context(library.session())
                    await session.generate(PROMPT, SamplingParams(max_new_tokens=1))
                async with asynchronous(gateway) as client:
                    with pytest.raises(openai.RateLimitError) as caught:
                        await client.completions.create(model=MODEL, prompt="x", stream=stream)
                assert int(caught.value.response.headers["retry-after"]) >= 1

        run(check())


class TestClientsThatGo:
    """Their slots are free."""

    def test_in_the_middle_of_a_stream(self, gateway, target):
        """As soon as the connection is closed."""

        async def check():
            async with asynchronous(gateway) as client:
                stream = await client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **ENDLESS)
                await anext(aiter(stream))
                await stream.close()

        run(check())
        target.wait_until_free(_FREE)
        last = wait_for(lambda: [one for one in gateway.requests() if "ended" in one], _FREE, "the request's log line")
        assert last[-1]["ended"] == "the client has gone"

    def test_that_wait_for_the_whole(self, gateway, target):
        """The same."""

        async def check():
            async with asynchronous(gateway) as client:
                request = client.completions.create(model=MODEL, prompt=PROMPT, **ENDLESS)
                waiting = asyncio.create_task(request)
                while not await asyncio.to_thread(lambda: target.info().slots_in_use):
                    assert not waiting.done()
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

        run(check())
        target.wait_until_free(_FREE)
        wait_for(lambda: [one for one in gateway.requests() if one["status"] == 499], _FREE, "the request's log line")


def test_it_drains(services, tmp_path):
    """A stream that is under way when the gateway is told to stop comes to its end, and the exit status is 0."""
    target, _, draft = services
    gateway = Gateway(tmp_path / "log", f"--target={target.address}", f"--draft={draft.address}")
    try:

        async def check():
            async with openai.AsyncOpenAI(base_url=gateway.url, api_key="none", max_retries=0) as client:
                [model] = [model.id async for model in client.models.list()]
                request = {"prompt": PROMPT, "max_tokens": 48, "stream": True, "extra_body": {"ignore_eos": True}}
                stream = await client.completions.create(model=model, **request)
                first = await anext(aiter(stream))
                gateway.send(signal.SIGTERM)
                pieces = [first, *[piece async for piece in stream]]
                assert pieces[-1].choices[0].finish_reason == "length"

        run(check())
        assert gateway.wait() == 0
        assert json.loads(gateway.text.splitlines()[-1])["event"] == "stopped"
    finally:
        gateway.stop()
