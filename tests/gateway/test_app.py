"""Laws of the HTTP interface, over an in-memory target."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from specpair import InternalError, OverloadedError, Phase, SamplingParams, UnavailableError
from specpair.wire import verify_request
from specpair_gateway.requests import ChatRequest, CompletionRequest

from ..client.fakes import FakeTarget, continuation, text_of
from .serving import (
    CHAT,
    COMPLETIONS,
    MODEL,
    Exchange,
    application,
    ask,
    caller,
    chat,
    client_of,
    completion,
    events,
    run,
    settle,
    until,
)

ENDPOINTS = {CHAT: chat, COMPLETIONS: completion}
KEY = "sk-0123456789abcdef"


def reference(prompt, **params):
    """What the client library says."""

    async def generate():
        async with client_of(FakeTarget()) as client:
            return await client.generate(prompt, SamplingParams(**params))

    return run(generate())


def text_in(pieces, index=0):
    """The text of a choice's pieces."""
    choices = [choice for piece in pieces for choice in piece["choices"] if choice["index"] == index]
    return "".join(choice.get("text", "") + choice.get("delta", {}).get("content", "") for choice in choices)


class TestAnswers:
    """The text is the client library's, in OpenAI's form."""

    def test_a_completion(self):
        """Whole."""
        answer = ask(application(), COMPLETIONS, completion(seed=3))
        known = reference([3, 4, 5], max_new_tokens=12, temperature=1.0, seed=3)
        assert answer.status_code == 200
        body = answer.json()
        assert body["object"] == "text_completion"
        assert body["model"] == MODEL
        assert body["choices"] == [{"index": 0, "text": known.text, "logprobs": None, "finish_reason": "length"}]
        usage = body["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 12, 15)
        told = usage["specpair"]
        assert told.keys() == {"accepted", "proposed", "rounds", "seed"}
        assert told["seed"] == 3
        # What is proposed depends on times; what comes of it is counted.
        assert 0 <= told["accepted"] <= told["proposed"]
        assert told["rounds"] + told["accepted"] == 12

    def test_a_chat(self):
        """Whole."""
        body = ask(application(), CHAT, chat(seed=3)).json()
        known = reference([{"role": "user", "content": "Hello"}], max_new_tokens=12, temperature=1.0, seed=3)
        assert body["object"] == "chat.completion"
        [choice] = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": known.text, "refusal": None}
        assert choice["finish_reason"] == "length"

    @pytest.mark.parametrize("path", ENDPOINTS)
    @pytest.mark.parametrize("draft", ["ngram", "none"])
    def test_a_stream_is_the_whole_in_pieces(self, path, draft):
        """One id, one text, one end; nothing of it has statistics that nobody asked for."""
        request = ENDPOINTS[path](seed=3)
        whole = ask(application(draft=draft), path, request).json()["choices"][0]
        pieces, done = events(ask(application(draft=draft), path, {**request, "stream": True}))
        assert done
        assert text_in(pieces) == (whole["text"] if path == COMPLETIONS else whole["message"]["content"])
        assert len({piece["id"] for piece in pieces}) == 1
        assert not any("usage" in piece for piece in pieces)
        finishes = [piece["choices"][0]["finish_reason"] for piece in pieces]
        assert finishes == [None] * (len(pieces) - 1) + ["length"]

    def test_the_beginning_of_a_streamed_chat(self):
        """Says who speaks, once for each choice."""
        pieces, _ = events(ask(application(), CHAT, chat(stream=True, n=2)))
        for index in range(2):
            roles = [
                choice["delta"].get("role")
                for piece in pieces
                for choice in piece["choices"]
                if choice["index"] == index
            ]
            assert roles == ["assistant"] + [None] * (len(roles) - 1)

    @pytest.mark.parametrize("path", ENDPOINTS)
    def test_statistics_of_a_stream(self, path):
        """Come last, by themselves, and are those of the whole; until then there is null in their place."""
        request = ENDPOINTS[path](seed=3)
        steady = {"draft_length": 3, "chain": 0}  # else what is proposed is a matter of time
        whole = ask(application(client=steady), path, request).json()["usage"]
        streamed = {**request, "stream": True, "stream_options": {"include_usage": True}}
        *pieces, last = events(ask(application(client=steady), path, streamed))[0]
        assert (last["choices"], last["usage"]) == ([], whole)
        assert {piece["usage"] for piece in pieces} == {None}

    def test_several_choices(self):
        """Each is what its own seed says to its own prompt, streamed or not; a prompt counts once."""
        request = completion(prompt=[[3, 4, 5], [6, 7]], n=2, seed=8, temperature=0.7)
        expected = [
            reference(prompt, max_new_tokens=12, temperature=0.7, seed=seed).text
            for prompt in ([3, 4, 5], [6, 7])
            for seed in (8, 9)
        ]
        body = ask(application(), COMPLETIONS, request).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in body["choices"]] == expected
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 48)
        pieces, _ = events(ask(application(), COMPLETIONS, {**request, "stream": True}))
        assert [text_in(pieces, index) for index in range(4)] == expected

    @pytest.mark.parametrize(
        ("target", "fields", "finish"),
        [
            ({}, {"max_tokens": 4}, "length"),
            ({"max_length": 8}, {}, "length"),
            ({}, {"stop_token_ids": [1, 2, 3, 4, 5, 6, 7]}, "stop"),
        ],
    )
    def test_why_it_ended(self, target, fields, finish):
        """A full cache is a length; stop ids are a stop."""
        body = ask(application(FakeTarget(**target)), COMPLETIONS, completion(**fields)).json()
        assert body["choices"][0]["finish_reason"] == finish

    def test_a_prediction_is_counted(self):
        """What was proposed of it is accepted or rejected, and the text is the same."""
        prompt = [{"role": "user", "content": "Hello"}]
        known = reference(prompt, max_new_tokens=24, temperature=0.0)
        ids = continuation(known.prompt_token_ids, 24)
        assert known.token_ids == tuple(ids)
        # The in-memory tokenizer takes the code of each character for its id.
        predicted = {"type": "content", "content": "".join(map(chr, ids))}
        body = ask(application(), CHAT, chat(max_tokens=24, temperature=0, seed=0, prediction=predicted)).json()
        assert body["choices"][0]["message"]["content"] == known.text
        details = body["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] > 12
        assert details["rejected_prediction_tokens"] == 0

    def test_log_probabilities_of_a_completion(self):
        """Tokens are the text, one behind the other, in one piece or in several."""
        request = completion(seed=3, logprobs=0)
        choice = ask(application(), COMPLETIONS, request).json()["choices"][0]
        known = reference([3, 4, 5], max_new_tokens=12, temperature=1.0, seed=3)
        said = choice["logprobs"]
        assert "".join(said["tokens"]) == choice["text"]
        assert said["token_logprobs"] == [-float(token.id) for token in known.tokens]
        for token, offset in zip(said["tokens"], said["text_offset"], strict=True):
            assert choice["text"].startswith(token, offset)
        assert said["top_logprobs"] == [{text_of(token.id): -float(token.id)} for token in known.tokens]
        pieces, _ = events(ask(application(), COMPLETIONS, {**request, "stream": True}))
        for name, value in said.items():
            assert [one for piece in pieces for one in piece["choices"][0]["logprobs"][name]] == value

    def test_log_probabilities_of_a_chat(self):
        """Every token of the output is there, with its bytes."""
        request = chat(seed=3, logprobs=True)
        choice = ask(application(), CHAT, request).json()["choices"][0]
        known = reference([{"role": "user", "content": "Hello"}], max_new_tokens=12, temperature=1.0, seed=3)
        expected = [
            {
                "token": text_of(token.id),
                "logprob": -float(token.id),
                "bytes": list(text_of(token.id).encode()),
                "top_logprobs": [],
            }
            for token in known.tokens
        ]
        assert choice["logprobs"]["content"] == expected
        pieces, _ = events(ask(application(), CHAT, {**request, "stream": True}))
        said = [piece["choices"][0]["logprobs"] for piece in pieces]
        assert [one for logprobs in said if logprobs for one in logprobs["content"]] == expected


class TestErrors:
    """Whatever goes wrong has a status, OpenAI's form and the request's id."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", ENDPOINTS)
    @pytest.mark.parametrize(
        ("failure", "status"),
        [(OverloadedError("f", retry_after=2.5, reason="X"), 429), (UnavailableError("a", retry_after=2.5), 503)],
    )
    def test_before_the_first_token(self, path, stream, failure, status):
        """A stream that cannot begin is no stream."""
        target = FakeTarget(failure=failure)
        app = application(target, served_model_name=MODEL)
        answer = ask(app, path, ENDPOINTS[path](stream=stream))
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "3")
        assert answer.json()["error"]["code"] == (failure.reason.lower() or None)

    @pytest.mark.parametrize("path", ENDPOINTS)
    def test_in_the_middle_of_a_stream(self, path):
        """What was there stays, the error is the last event, and nobody says that it is done."""
        target = FakeTarget(breaks={4: InternalError("secret", request_id="t1")})
        answer = ask(application(target), path, ENDPOINTS[path](stream=True, max_tokens=64), {"x-request-id": "r7"})
        (*pieces, last), done = events(answer)
        assert answer.status_code == 200
        assert text_in(pieces)
        assert not done
        assert last["error"]["type"] == "server_error"
        assert "r7" in last["error"]["message"]
        assert "secret" not in answer.text
        assert target.streams[-1].cancelled

    def test_in_one_of_several_choices(self):
        """The others end with it."""
        target = FakeTarget(breaks={9: InternalError("secret", request_id="t1")})
        answer = ask(application(target), COMPLETIONS, completion(n=3, max_tokens=64))
        assert answer.status_code == 500
        assert len(target.streams) == 3
        assert all(stream.cancelled or stream.finished for stream in target.streams)

    @pytest.mark.parametrize("path", ENDPOINTS)
    def test_an_unknown_model(self, path):
        """Is not found."""
        answer = ask(application(), path, ENDPOINTS[path](model="other"))
        assert answer.status_code == 404
        said = answer.json()["error"]
        assert (said["type"], said["param"], said["code"]) == ("invalid_request_error", "model", "model_not_found")

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"model": MODEL}, "prompt"),
            ({"prompt": "x"}, "model"),
            (completion(temperature="hot"), "temperature"),
            (completion(stop=["x", 5]), "stop[1]"),
            (completion(tools=[{}]), "tools"),
            ([1], None),
        ],
    )
    def test_a_bad_request_names_its_field(self, body, param):
        """Whoever finds it."""
        answer = ask(application(), COMPLETIONS, body)
        assert answer.status_code == 400
        said = answer.json()["error"]
        assert said["param"] == param
        assert said["message"].startswith("the body has to be a JSON object" if param is None else f"{param}: ")
        assert set(said) == {"message", "type", "param", "code"}

    @pytest.mark.parametrize("path", ENDPOINTS)
    @pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
    def test_what_is_not_said_to_be_json(self, path, headers):
        """As curl sends it when it is told nothing: whoever asks learns what the request has to look like."""

        async def post():
            async with caller(application()) as http:
                return await http.post(path, content=json.dumps(ENDPOINTS[path]()), headers=headers)

        answer = run(post())
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].endswith("a JSON object, sent with Content-Type: application/json")

    def test_what_the_target_refuses(self):
        """Is called as the caller called it."""
        answer = ask(application(), COMPLETIONS, completion(seed=-(2**70), prompt=""))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")

    def test_what_is_not_json(self):
        """Or too deep, or no text."""

        async def post():
            async with caller(application()) as http:
                headers = {"content-type": "application/json"}
                bodies = [b"{nope", b"[" * 100_000, b"\xff\xfe"]
                return [await http.post(COMPLETIONS, content=body, headers=headers) for body in bodies]

        for answer in run(post()):
            assert answer.status_code == 400
            assert answer.json()["error"]["type"] == "invalid_request_error"

    def test_what_is_not_there(self):
        """Paths and methods."""
        assert ask(application(), "/v1/embeddings", {}).status_code == 404
        assert ask(application(), COMPLETIONS, method="GET").status_code == 405
        assert ask(application(), "/nothing").json()["error"]["type"] == "invalid_request_error"

    def test_a_body_that_is_too_long(self):
        """Is not read to its end."""

        async def post():
            sent = 0

            async def body():
                nonlocal sent
                for _ in range(100):
                    sent += 1
                    yield b" " * 1024

            async with caller(application(max_body=4096)) as http:
                answer = await http.post(COMPLETIONS, content=body(), headers={"content-type": "application/json"})
            return answer, sent

        answer, sent = run(post())
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert sent < 10

    def test_a_deadline(self):
        """A request that takes longer than it may is over."""
        answer = ask(application(FakeTarget(delay=60.0), timeout=0.05), COMPLETIONS, completion())
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")

    def test_a_fault_of_our_own(self, monkeypatch):
        """Is logged, and said to be one."""

        def broken(*_):
            raise RuntimeError("secret")

        monkeypatch.setattr("specpair_gateway.app.Generations", broken)
        with structlog.testing.capture_logs() as lines:
            answer = ask(application(), COMPLETIONS, completion(), {"x-request-id": "r7"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "r7")
        assert "secret" not in answer.text
        assert "unexpected error" in [line["event"] for line in lines]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


class WireTarget(FakeTarget):
    """A target that is asked in messages."""

    async def verify(self, start, within=None):
        verify_request(start)
        return await super().verify(start, within)


@pytest.mark.parametrize("path", ENDPOINTS)
@given(data=st.data())
def test_no_request_is_a_failure_of_ours(path, data):
    """Whatever stands in whatever field, the answer is a text or what is wrong with the request."""
    model = ChatRequest if path == CHAT else CompletionRequest
    names = st.sampled_from(sorted(model.model_fields)) | st.text(st.characters(exclude_categories=[]), max_size=8)
    fields = data.draw(st.dictionaries(names, JSON, max_size=4))
    # As clients write it that do not keep to standards either.
    body = json.dumps({**ENDPOINTS[path](), **fields})

    async def post():
        app = application(WireTarget(max_length=64), served_model_name=MODEL)
        async with caller(app) as http:
            return await http.post(path, content=body, headers={"content-type": "application/json"})

    with structlog.testing.capture_logs():
        answer = run(post())
    assert answer.status_code in {200, 400, 404}
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"\ud800": 1}, None),
        ({"model": "\ud800"}, "model"),
        ({"logit_bias": {"\ud800": 1}}, "logit_bias.\ud800"),
        ({"n": 10**400}, "n"),
    ],
)
def test_what_no_text_can_hold(fields, param):
    """Half a character, or a number of many digits, comes back as JSON can say it."""
    body = json.dumps({**completion(), **fields})

    async def post():
        async with caller(application()) as http:
            return await http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})

    answer = run(post())
    assert answer.status_code in {400, 404}
    assert answer.json()["error"]["param"] == param


class TestIds:
    """A request has an id, its caller's or one of ours."""

    def test_of_the_caller(self):
        """It comes back."""
        assert ask(application(), "/v1/models", headers={"x-request-id": "a.b-1"}).headers["x-request-id"] == "a.b-1"

    @pytest.mark.parametrize("given", [None, "", "a b", "x" * 200, 'a"b'])
    def test_of_ours(self, given):
        """Where there is none that can be taken over."""
        headers = {} if given is None else {"x-request-id": given}
        made = ask(application(), "/v1/models", headers=headers).headers["x-request-id"]
        assert len(made) == 32
        assert made != given


class TestKeys:
    """With keys, nothing but health is open."""

    @pytest.fixture
    def app(self, tmp_path):
        file = tmp_path / "keys"
        digest = hashlib.sha256(b"sk-another-key-0123").hexdigest()
        file.write_text(f"# who\nalice:{KEY}\nbob:sha256:{digest}\n")
        file.chmod(0o600)
        return application(api_keys=str(file))

    @pytest.mark.parametrize("key", [KEY, "sk-another-key-0123"])
    def test_a_known_one(self, app, key):
        """Is let in."""
        assert ask(app, "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200

    @pytest.mark.parametrize("path", ["/v1/models", COMPLETIONS, "/nothing", "/v1/models/../../health"])
    @pytest.mark.parametrize("value", [None, "", "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}", KEY])
    def test_any_other(self, app, path, value):
        """Is not, wherever it asks, and learns nothing of what there is."""
        headers = {} if value is None else {"authorization": value}
        answer = ask(app, path, headers=headers)
        if path.endswith("/health"):  # httpx has resolved the dots
            assert answer.status_code == 200
            return
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"

    def test_health_is_open(self, app):
        """Probes have no key."""
        assert ask(app, "/health").status_code == 200


class TestModels:
    """Models are called as they are served."""

    def test_the_targets_own_name(self):
        """Where no other is given."""
        app = application()
        body = ask(app, "/v1/models").json()
        assert [model["id"] for model in body["data"]] == [MODEL]
        assert ask(app, f"/v1/models/{MODEL}").json() == body["data"][0]

    @pytest.mark.parametrize(
        ("model", "name"),
        [("org/model", "org/model"), ("/srv/models/m-7b/", "m-7b"), ("models/demo/target", "target"), ("./m", "m")],
    )
    def test_a_directory_is_not_told(self, model, name):
        """Its last part is a name; a hub id is one as it is."""
        target = FakeTarget()
        info = target.info

        async def renamed(within=None):
            return replace(await info(within), model=model)

        target.info = renamed
        assert ask(application(target), "/v1/models").json()["data"][0]["id"] == name
        assert ask(application(target), f"/v1/models/{name}").status_code == 200

    def test_given_names(self):
        """Stand in place of the target's, which is not even asked."""
        target = FakeTarget(failure=UnavailableError("away"))
        app = application(target, served_model_name="large, large-2026")
        assert [model["id"] for model in ask(app, "/v1/models").json()["data"]] == ["large", "large-2026"]
        assert ask(app, "/v1/models/large-2026").status_code == 200
        assert ask(app, f"/v1/models/{MODEL}").status_code == 404


@pytest.mark.parametrize(("phase", "status"), [(Phase.READY, 200), (Phase.LOADING, 503)])
def test_health(phase, status):
    """Is the target's."""
    app = application(FakeTarget(phase=phase))
    answer = ask(app, "/health")
    assert answer.status_code == status
    assert answer.json()["target"] == (status == 200)
    assert ask(app, "/health", method="HEAD").status_code == status


class TestClientsThatGo:
    """Nobody computes for somebody who has gone."""

    @pytest.mark.parametrize("path", ENDPOINTS)
    @pytest.mark.parametrize("stream", [False, True])
    def test_before_the_first_token(self, path, stream):
        """While the target is silent."""

        async def check():
            target = FakeTarget(delay=3600.0)
            exchange = Exchange(application(target), path, ENDPOINTS[path](stream=stream, n=2))
            running = asyncio.create_task(exchange())
            await until(lambda: len(target.streams) == 2)
            exchange.gone.set()
            await running
            assert all(stream.cancelled for stream in target.streams)

        run(check())

    def test_in_the_middle(self):
        """With what was sent already taken."""

        async def check():
            target = FakeTarget(delay=0.001)
            request = completion(stream=True, max_tokens=1000)
            exchange = Exchange(application(target, client={"draft_length": 0}), COMPLETIONS, request)
            running = asyncio.create_task(exchange())
            await until(lambda: len(exchange.sent) >= 3)
            exchange.gone.set()
            await running
            assert target.streams[-1].cancelled
            assert exchange.sent[-1]["more_body"]

        run(check())

    @pytest.mark.parametrize("taken", [0, 1, 5])
    def test_that_stop_reading(self, taken):
        """The generation waits for them, and not for ever."""

        async def check():
            target = FakeTarget()
            request = completion(stream=True, max_tokens=500)
            app = application(target, client={"draft_length": 0}, stall_timeout=0.5)
            exchange = Exchange(app, COMPLETIONS, request)
            exchange.most = taken
            running = asyncio.create_task(exchange())
            await settle()
            begun = len(target.blocks)
            assert 0 < begun < 20
            await settle()
            assert (len(target.blocks), len(exchange.sent)) == (begun, taken)
            await running
            assert target.streams[-1].cancelled
            assert len(target.blocks) == begun

        run(check())


def test_logs_have_no_texts():
    """One line per request, with counts."""
    with structlog.testing.capture_logs() as lines:
        ask(application(), CHAT, chat(messages=[{"role": "user", "content": "confidential"}], stream=True))
    [line] = [line for line in lines if line["event"] == "request"]
    assert line["status"] == 200
    assert "confidential" not in json.dumps(lines, default=str)
    assert "<" not in json.dumps(line, default=str)
