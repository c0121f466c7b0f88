"""Laws of `specpair chat`: what is said, how it is shown, what else can be typed."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import stat

import pytest
from rich.console import Console

from specpair import SamplingParams, SpeculativeClient
from specpair.chat.conversation import Conversation
from specpair.chat.display import LiveAnswer
from specpair.chat.prompting import PromptReader
from specpair.chat.repl import Repl
from specpair.chat.slash import changed, described, parsed
from specpair.errors import InvalidRequestError
from specpair.results import Chunk, Source, Stats, Token

from .commanding import command
from .fakes import FakeTarget, continuation, text_of, tokenized
from .loopback import DraftServicer, TargetServicer, serving

PARAMS = SamplingParams(max_new_tokens=9)


def conversing(work, *, params=PARAMS, target=None, **options):
    """Runs `work(conversation, target)` with a client of fakes."""
    target = target or FakeTarget()

    async def run():
        async with SpeculativeClient("t", "ngram", target_transport=target) as client:
            conversation = Conversation(client, params, **options)
            try:
                return await work(conversation, target)
            finally:
                await conversation.aclose()

    return asyncio.run(run())


async def said(conversation, text, most=None):
    """The ids of an answer, which is left behind so many tokens."""
    async with conversation.turn(text) as stream:
        async for _ in stream:
            if most is not None and len(stream.tokens) >= most:
                break
    return [token.id for token in stream.tokens]


def test_turns_share_a_session():
    """Later turns extend the first one's stream, and everything said is kept as messages."""

    async def work(conversation, target):
        first = await said(conversation, "one")
        second = await said(conversation, "two")
        assert len(target.streams) == 1
        texts = ["".join(map(text_of, ids)) for ids in (first, second)]
        contents = [message["content"] for message in conversation.messages]
        assert contents == ["be brief", "one", texts[0], "two", texts[1]]
        assert [message["role"] for message in conversation.messages[:3]] == ["system", "user", "assistant"]
        assert [one["content"] for one in target.starts[0].prompt] == ["be brief", "one"]

    conversing(work, system="be brief")


@pytest.mark.parametrize("plain", [False, True])
def test_an_answer_that_is_stopped_stays_said(plain):
    """What was committed of it is part of the conversation, with which the next turn opens another session."""

    async def work(conversation, target):
        await said(conversation, "one")
        part = await said(conversation, "two", most=1)
        assert conversation.last is None
        before = conversation.messages, conversation.text
        assert before[0][-1]["content"] == "".join(map(text_of, part))
        await said(conversation, "three")
        assert len(target.streams) == 2
        again = target.starts[1].prompt
        if plain:
            assert list(again) == tokenized("one\n") + continuation(tokenized("one\n"), 9) + [
                *tokenized("\ntwo\n"),
                *part,
                *tokenized("\nthree\n"),
            ]
        else:
            assert list(again) == [*before[0], {"role": "user", "content": "three"}]

    conversing(work, plain=plain)


def test_a_turn_that_brings_nothing_was_never_said():
    """As one that the target refuses: the conversation goes on as if it had not been."""

    class Refusing(FakeTarget):
        """Refuses a turn that says nothing."""

        async def verify(self, start, within=None):
            if start.prompt[-1]["content"] == "":
                raise InvalidRequestError("must not be empty", field="start.prompt")
            return await super().verify(start, within)

    async def fresh(conversation, target):
        with pytest.raises(InvalidRequestError):
            await said(conversation, "")
        assert conversation.messages == []
        assert await said(conversation, "two")

    conversing(fresh, target=Refusing())


def test_reset_and_instruct():
    """Nothing is left but the system message; another one is as if it had been there from the start."""

    async def work(conversation, target):
        await said(conversation, "one")
        await conversation.instruct("be kind")
        await said(conversation, "two")
        contents = [message["content"] for message in target.starts[1].prompt]
        assert (contents[0], contents[1], contents[-1]) == ("be kind", "one", "two")
        await conversation.reset()
        await said(conversation, "three")
        assert [message["content"] for message in target.starts[2].prompt] == ["be kind", "three"]

    conversing(work, system="be brief")


def test_commands_and_what_is_said():
    """A slash makes a command, two say one; what is none is refused by name."""
    assert parsed("/save  a b ") == ("/save", "a b")
    assert parsed("/help") == ("/help", "")
    assert parsed("//help") is None
    assert parsed("what is 1/2?") is None
    with pytest.raises(InvalidRequestError, match=r"^/nonsense: "):
        parsed("/nonsense x")


def test_parameters_are_changed_by_name():
    """As their types say; without a value they are the default again."""
    params = changed(PARAMS, "temperature=0.5 top-k=3 rule=rejection")
    assert (params.temperature, params.top_k, params.rule) == (0.5, 3, "rejection")
    assert changed(params, "temperature= top_k= rule=") == PARAMS
    assert described(params) == "temperature=0.5 top_k=3 max_new_tokens=9 rule=rejection"
    assert described(SamplingParams()) == "all at their defaults"
    for wrong in ("temperature", "temperatur=1", "top_k=1.5", "rule=fair", "stop=x"):
        with pytest.raises(InvalidRequestError, match=r"^/params: "):
            changed(PARAMS, wrong)


class Typed:
    """Somebody who types these lines; a function is called in place of a line."""

    interactive = True

    def __init__(self, *lines):
        self.lines = list(lines)

    async def read(self):
        return self.lines.pop(0) if self.lines else None


class Shown:
    """A display that keeps texts; `on_chunk` is called with each."""

    def __init__(self, on_chunk=lambda: None):
        self.texts = []
        self.on_chunk = on_chunk

    def __call__(self):
        self.texts.append("")
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def show(self, chunk, stats):
        self.texts[-1] += chunk.text
        self.on_chunk()

    def end(self, result):
        self.texts[-1] += "."


def typed(*lines, shown=None, params=PARAMS, **options):
    """What is shown of a chat in which these lines are typed, and what is said in it."""
    shown = shown or Shown()

    async def work(conversation, target):
        await Repl(conversation._client, conversation, Typed(*lines), shown).run()
        return shown.texts, conversation.messages, target

    return conversing(work, params=params, **options)


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    """The next turn is answered, and the handler from before is back."""
    before = signal.getsignal(signal.SIGINT)
    interrupts = iter([True])
    shown = Shown(lambda: next(interrupts, False) and os.kill(os.getpid(), signal.SIGINT))
    texts, messages, target = typed("one", "two", shown=shown, params=SamplingParams(max_new_tokens=200))
    assert not texts[0].endswith(".")
    assert texts[1].endswith(".")
    assert len(target.streams) == 2
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one", "two"]
    assert signal.getsignal(signal.SIGINT) == before


def test_errors_do_not_end_a_chat(capsys):
    """Neither a command that is none nor a parameter that cannot be; /quit does, and nothing behind it is said."""
    texts, messages, _ = typed("/nonsense", "/params top_k=x", "/system", "", "one", "/quit", "two", system="brief")
    assert len(texts) == 1
    assert [message["content"] for message in messages][:2] == ["brief", "one"]
    printed = capsys.readouterr()
    assert "error: /nonsense: " in printed.err
    assert "error: /params: " in printed.err
    assert "brief" in printed.out


def test_commands_of_a_chat(tmp_path, capsys):
    """/params changes the next turn, /save writes what was said, /explain shows the last answer's beginning."""
    file = tmp_path / "said.json"
    lines = ["one", "/params max_new_tokens=2", "two", f"/save {file}", "/explain", "/help"]
    lines += ["/save", "/save /no/where", "/save ~nobody-of-that-name/file", "/save nul\0"]
    texts, messages, target = typed(*lines)
    assert texts[1] == "".join(map(text_of, continuation(tokenized(messages[:-1]), 2))) + "."
    assert json.loads(file.read_text()) == messages
    assert tuple(tokenized(messages[:-1])) == tuple(target.questions[0].prompt)
    printed = capsys.readouterr()
    for word in ("verdict", "/reset", "max_new_tokens=2"):
        assert word in printed.out
    assert printed.err.count("error: /save: ") == 4


def token(text, source):
    return Token(1, text, source)


def test_live_answers_show_provenance_and_figures():
    """Finished lines stay as they are, the tally is below, and nothing in a text controls the terminal."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=80, legacy_windows=False)
    stats = Stats(rounds=2, proposed=4, accepted=2, accepted_by_source={Source.MODEL: 2}, output_tokens=3, seconds=1.0)
    with LiveAnswer(console) as answer:
        tokens = (token("a\nb", Source.MODEL), token("\x1b[2Jc", Source.NGRAM), token("d\n", Source.TARGET))
        answer.show(Chunk(tokens, ""), stats)
    written = file.getvalue()
    assert "\x1b[2J" not in written
    assert "\x1b[32ma" in written
    assert "\x1b[36m␛[2Jc" in written
    final = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.rpartition("\x1b[2K")[2])
    assert "2 of 4 proposals accepted (50%)" in final
    assert "3.0 tokens/s" in final


def test_history_is_the_users_alone(tmp_path, monkeypatch, capsys):
    """A file that nobody else can read; without one, or where it cannot be written, it lasts as long as the chat."""
    monkeypatch.setenv("TERM", "dumb")
    file = tmp_path / "state" / "specpair" / "chat_history"
    PromptReader(file, ["/help"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    PromptReader(None, [])
    PromptReader(tmp_path / "state" / "specpair" / "chat_history" / "below", [])
    assert "no history: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def address():
    with serving(TargetServicer(), DraftServicer()) as opened:
        yield opened


def piped(address, stdin, *arguments, **others):
    flags = ["--target", address, "--draft", address, "--max-new-tokens", "5"]
    return command("chat", *flags, *arguments, stdin=stdin, **others)


def test_lines_are_turns_where_nobody_types(address):
    """Each answer is printed as it is; the second one continues everything before. A slash is nothing special."""
    done = piped(address, "one\n/two\n", "--plain")
    assert (done.returncode, done.stderr) == (0, "")
    ids = [ord(character) % 50 for character in "one\n"]
    first = continuation(ids, 5)
    second = continuation([*ids, *first, *(ord(character) % 50 for character in "\n/two\n")], 5)
    assert done.stdout.splitlines() == ["".join(map(text_of, turn)) for turn in (first, second)]


def test_json_is_an_object_per_turn(address):
    """As `generate` prints it."""
    done = piped(address, "one\ntwo", "--plain", "--json")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["stats"]["cached_tokens"] == 0 < second["stats"]["cached_tokens"]
    assert len(first["token_ids"]) == len(second["token_ids"]) == 5


@pytest.mark.parametrize(
    ("stdin", "arguments", "code", "error"),
    [
        ("one\n", [], 2, "error: plain: the model has no chat template"),
        ("one\n", ["--plain", "--system", "x"], 2, "error: system: "),
        ("one\n", ["--plain", "--top-k", "-1"], 2, "error: start.sampling.top_k: "),
        ("\n", ["--plain"], 2, "error: turn: must not be empty"),
        ("one\n", ["--plain", "--target", "127.0.0.1:1"], 3, "error: "),
        ("", ["--plain"], 0, ""),
    ],
)
def test_errors_end_a_chat_that_nobody_types(address, stdin, arguments, code, error):
    """One line and an exit code, as of every command."""
    done = piped(address, stdin, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == (1 if error else 0)
