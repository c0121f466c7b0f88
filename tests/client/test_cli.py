"""Laws of the `specpair` command."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import specpair
from specpair import (
    AcceptanceRule,
    FinishReason,
    Logprobs,
    Result,
    SamplingParams,
    Source,
    Stats,
    Token,
    errors,
    wire,
)
from specpair.cli import exit_code
from specpair.explaining import continuation_ids
from specpair.messages import Start
from specpair.rendering import result_object

from .commanding import command
from .fakes import VOCABULARY, continuation, text_of
from .loopback import DraftServicer, TargetServicer, serving

PROMPT = "def f(x):\n\treturn"
PROMPT_IDS = [ord(c) % VOCABULARY for c in PROMPT]
EXPECTED = continuation(PROMPT_IDS, 30)


@pytest.fixture(scope="module")
def address():
    with serving(TargetServicer(), DraftServicer()) as opened:
        yield opened


def generate(address, *arguments, **others):
    arguments = ["--target", address, "--draft", address, "--max-new-tokens", "30", *arguments]
    return command("generate", *arguments, **others)


def test_the_text_goes_to_stdout_and_nothing_else(address):
    """Piped, the output is the text and a newline."""
    done = generate(address, PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(map(text_of, EXPECTED)) + "\n"


def test_a_prompt_comes_from_a_file_or_from_stdin(address, tmp_path):
    """Byte for byte: no newline is added or removed."""
    file = tmp_path / "prompt.txt"
    file.write_bytes(PROMPT.encode())
    outputs = {
        generate(address, *arguments, stdin=stdin).stdout
        for arguments, stdin in [
            ([PROMPT], None),
            (["--prompt-file", str(file)], None),
            (["--prompt-file", "-"], PROMPT),
        ]
    }
    assert len(outputs) == 1


def test_a_prediction_comes_from_a_file(address, tmp_path):
    """A text that turns out to be the output comes in whole blocks; one that cannot be read is named."""
    file = tmp_path / "prediction.txt"
    file.write_text("".join(map(chr, EXPECTED)))  # tokenized to these ids
    done = generate(address, "--json", "--draft", "ngram", "--prediction-file", str(file), PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    output = json.loads(done.stdout)
    assert output["token_ids"] == EXPECTED
    assert output["stats"]["accepted_by_source"].keys() == {"prediction"}
    refused = generate(address, "--prediction-file", str(tmp_path), PROMPT)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: prediction_file: cannot read ")


@pytest.mark.parametrize("draft", ["model", "ngram", "none"])
def test_json_is_one_object(address, draft):
    """Text, ids and statistics as numbers."""
    done = generate(address, "--json", "--draft", address if draft == "model" else draft, PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    output = json.loads(done.stdout)
    assert output["token_ids"] == EXPECTED
    assert output["text"] == "".join(map(text_of, EXPECTED))
    assert output["prompt_tokens"] == len(PROMPT)
    assert output["finish_reason"] == "max_new_tokens"
    stats = output["stats"]
    assert stats["output_tokens"] == 30
    assert stats["accepted"] <= stats["proposed"]
    assert stats["acceptance_rate"] == (stats["accepted"] / stats["proposed"] if stats["proposed"] else 0.0)
    assert stats["tokens_per_second"] > 0
    assert stats["proposer"] == draft


def test_ids_in_place_of_text(address):
    """With --ids the output is the token ids."""
    assert generate(address, "--ids", PROMPT).stdout.split() == [str(id_) for id_ in EXPECTED]


def test_colours_tell_who_proposed(address):
    """Where colours are wanted, accepted proposals are green, and a summary is on stderr."""
    done = generate(address, PROMPT, FORCE_COLOR="1", NO_COLOR="")
    assert "\x1b[32m" in done.stdout
    assert "proposals accepted" in done.stderr


def test_every_option_reaches_the_target():
    """Each flag is its field of SamplingParams; what may be repeated is collected."""
    flags = {
        "--max-new-tokens": "30",
        "--min-new-tokens": "2",
        "--temperature": "0.5",
        "--top-k": "4",
        "--top-p": "0.75",
        "--min-p": "0.25",
        "--repetition-penalty": "1.5",
        "--presence-penalty": "-0.5",
        "--frequency-penalty": "0.5",
        "--seed": "7",
        "--rule": "rejection",
        "--logprobs": "3",
    }
    repeated = ["--logit-bias", "7=-1.5", "--logit-bias=9=2", "--stop", "\n", "--stop", "é"]
    repeated += ["--stop-token-id", "49", "--stop-token-id=48", "--ignore-eos"]
    servicer = TargetServicer()
    with serving(servicer) as address:
        given = [part for flag in flags.items() for part in flag]
        done = command("generate", "--target", address, "--draft", "ngram", "--json", *given, *repeated, PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    params = SamplingParams(
        temperature=0.5,
        top_k=4,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        logit_bias={7: -1.5, 9: 2.0},
        seed=7,
        max_new_tokens=30,
        min_new_tokens=2,
        rule=AcceptanceRule.REJECTION,
        stop=("\n", "é"),
        stop_token_ids=(49, 48),
        ignore_eos=True,
        logprobs=3,
    )
    assert servicer.starts == [wire.verify_request(Start(PROMPT, params)).start]


def test_log_probabilities_are_part_of_the_object():
    """One entry per token, as finite numbers or null; null as a whole when they were not asked for."""
    tokens = [Token(1, "a", Source.TARGET, Logprobs(-0.5, ((1, -0.5), (2, float("-inf")))))]
    result = Result("a", tuple(tokens), (3,), FinishReason.MAX_NEW_TOKENS, Stats())
    assert result_object(result)["logprobs"] == [
        {"logprob": -0.5, "top": [{"token_id": 1, "logprob": -0.5}, {"token_id": 2, "logprob": None}]}
    ]
    assert result_object(replace(result, tokens=(Token(1, "a", Source.TARGET),)))["logprobs"] is None


def explain(address, *arguments):
    return command("explain", PROMPT, "--target", address, *arguments)


def test_explain_a_proposal(address):
    """Ids, or a text whose ids are those that it adds to the prompt's; the place behind the proposal comes last."""
    ids = [*EXPECTED[:2], EXPECTED[2] + 1]
    text = "".join(chr(id_) for id_ in ids)  # the fake's tokenizer
    for arguments in (["--proposal-ids", ",".join(map(str, ids))], ["--proposal", text]):
        done = explain(address, *arguments, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        printed = json.loads(done.stdout)
        assert (printed["proposed"], printed["accepted"]) == (3, 2)
        positions = printed["positions"]
        assert [one["position"] for one in positions] == [len(PROMPT) + row for row in range(4)]
        assert [one["proposed_token_id"] for one in positions] == [*ids, None]
        assert [one["proposed_text"] for one in positions] == [*map(text_of, ids), None]
        assert [one["target_token_id"] for one in positions[:3]] == EXPECTED[:3]
        assert [one["target_text"] for one in positions[:3]] == [text_of(id_) for id_ in EXPECTED[:3]]
        assert [one["accepted"] for one in positions] == [True, True, False, False]
        assert {one["draft_prob"] for one in positions} == {None}
    done = explain(address, "--proposal-ids", ",".join(map(str, ids)))
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("verdict", "accepted", "rejected", text_of(EXPECTED[0]), "0.7500"):
        assert word in done.stdout


def test_explain_what_a_draft_proposes(address):
    """As many tokens as a block holds, or as told; with its probabilities where the rule needs them."""
    printed = json.loads(explain(address, "--draft", address, "--json").stdout)
    assert (printed["proposed"], printed["accepted"]) == (7, 7)
    printed = json.loads(explain(address, "--draft", address, "--draft-length", "2", "--json").stdout)
    assert [one["proposed_token_id"] for one in printed["positions"]] == [*EXPECTED[:2], None]
    sampled = ["--rule", "rejection", "--temperature", "1"]
    printed = json.loads(explain(address, "--draft", address, *sampled, "--json").stdout)
    assert [one["draft_prob"] for one in printed["positions"]] == [*[0.5] * 7, None]


def test_a_text_that_melts_with_the_prompt_is_tokenized_by_itself():
    """Ids behind the prompt's where both together have them, else the text's own without special tokens in front."""

    class Melting:
        async def tokenize(self, text):
            return {"ab": (0, 1, 2), "abc": (0, 1, 3), "c": (0, 4), "abd": (0, 1, 2, 5), "d": (0, 6)}[text]

        async def detokenize(self, ids):
            return "" if ids[0] == 0 else "x"

    assert asyncio.run(continuation_ids(Melting(), "ab", "d")) == (5,)
    assert asyncio.run(continuation_ids(Melting(), "ab", "c")) == (4,)


PLAN = {
    "model": "m",
    "architecture": "MistralForCausalLM",
    "parameters": 7_241_732_096,
    "max_length": 512,
    "formats": [{"name": "bf16", "weights": 14_483_464_448, "slot": 67_108_864}],
    "fits": {"24000000000": {"bf16": 106}, "85899345920": {"bf16": 936}},
    "parallel": 1,
}


def plan(tmp_path, script, *arguments):
    """`specpair plan` with a shell script in place of Python for the runtime's own process."""
    runtime = tmp_path / "runtime"
    runtime.write_text(f"#!/bin/sh\n{script}\n")
    runtime.chmod(0o755)
    code = (
        f"import sys; sys.executable = {str(runtime)!r}; sys.argv[1:] = {['plan', *arguments]!r}; "
        "from specpair.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
    )


def test_plan_shows_what_the_runtime_computed(tmp_path):
    """A process of its own is told model, length and sizes; its figures are shown in GiB, GB and slots, or as JSON."""
    script = f"echo \"$@\" > {tmp_path}/asked; echo '{json.dumps(PLAN)}'"
    arguments = ["--max-length", "512", "--gpu", "24GB", "--gpu", "80GiB", "m"]
    done = plan(tmp_path, script, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("MistralForCausalLM", "7.24 billion", "13.49", "14.48", "64.0", "24 GB", "80 GiB", "106", "936"):
        assert word in done.stdout
    asked = "-m specpair_runtime.plan --gpu=24GB --gpu=80GiB --max-length=512 -- m\n"
    assert (tmp_path / "asked").read_text() == asked
    assert json.loads(plan(tmp_path, script, *arguments, "--json").stdout) == PLAN


@pytest.mark.parametrize(
    ("script", "code", "error"),
    [
        ("echo warning >&2; echo 'error: model: no such directory: m' >&2; exit 2", 2, "model: no such directory: m"),
        ("echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1", 2, "planning needs the extra target: "),
        ("echo 'RuntimeError: what' >&2; exit 1", 1, "the plan ended with code 1: RuntimeError: what"),
        ("kill -9 $$", 1, "the plan ended with code -9: no output"),
    ],
)
def test_plan_passes_refusals_through(tmp_path, script, code, error):
    """One line, whatever the runtime's process said before it."""
    done = plan(tmp_path, script, "m")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: {error}")
    assert done.stderr.count("\n") == 1


def test_info_and_health(address):
    """Both services are shown and asked."""
    done = command("info", "--target", address, "--draft", address)
    assert "target" in done.stdout
    assert "draft" in done.stdout
    info = json.loads(command("info", "--target", address, "--draft", address, "--json").stdout)
    assert (info["target"]["phase"], info["draft"]["fingerprint"]["vocabulary_size"]) == ("ready", VOCABULARY)
    assert command("health", "--target", address, "--draft", address).returncode == 0
    assert command("health", "--target", address, "--draft", "127.0.0.1:1").returncode == 1
    half = command("health", "--target", address, "--draft", "127.0.0.1:1", "--json")
    assert half.returncode == 1
    assert json.loads(half.stdout) == {
        "target": {"address": address, "serving": True},
        "draft": {"address": "127.0.0.1:1", "serving": False},
    }
    asked = json.loads(command("health", "--draft", address, "--json").stdout)
    assert asked == {"draft": {"address": address, "serving": True}}


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        ([PROMPT, "--target", "127.0.0.1:1"], 3, "error: "),
        ([PROMPT, "--top-k", "-1"], 2, "error: start.sampling.top_k: "),
        ([PROMPT, "--stop-token-id", "-1"], 2, "error: start.stop.stop_token_ids[0]: "),
        ([PROMPT, "--logprobs", "-1"], 2, "error: start.logprobs.top_n: "),
        ([PROMPT, "--logit-bias", "7"], 2, "error: logit_bias: '7' is not ID=VALUE"),
        ([PROMPT, "--logit-bias", "a=1"], 2, "error: logit_bias: 'a=1' is not ID=VALUE"),
        ([PROMPT, "--logit-bias", "-1=1"], 2, "error: start.sampling.logit_bias[-1]: "),
        (["full"], 3, "error: no slot"),
        ([""], 2, "error: start.prompt: must not be empty"),
        ([PROMPT, "--draft-length", "-1"], 2, "error: draft_length: "),
        ([], 2, "error: prompt: "),
        ([PROMPT, "--prompt-file", "-"], 2, "error: prompt: "),
        (["--prompt-file", "/does/not/exist"], 2, "error: prompt_file: "),
        ([PROMPT, "--max-new-tokens", "100000", "--timeout", "0.001"], 4, "error: not finished within 0.001 s"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(address, arguments, code, error):
    """`error: FIELD: what is wrong` on stderr, nothing on stdout, no traceback."""
    done = generate(address, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "error: proposal: give one of"),
        (["--proposal-ids", "1", "--draft", "ngram"], "error: proposal: give one of"),
        (["--proposal-ids", "1,x"], "error: proposal_ids: '1,x' is not a list"),
        (["--proposal-ids", "-1"], "error: token_ids[0]: "),
        (["--proposal-ids", "1", "--top-k", "-1"], "error: sampling.top_k: "),
        (["--proposal-ids", "1", "--logit-bias", "1"], "error: logit_bias: "),
    ],
)
def test_errors_of_explain(address, arguments, error):
    """The same form: one line that names the field, exit code 2."""
    done = explain(address, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == 1


def test_every_error_has_an_exit_code():
    """0 is success only."""
    codes = {kind: exit_code(getattr(errors, kind)("x")) for kind in errors.__all__ if kind.endswith("Error")}
    assert codes["InvalidRequestError"] == codes["UnsupportedError"] == codes["DraftMismatchError"] == 2
    assert codes["UnavailableError"] == codes["OverloadedError"] == 3
    assert codes["DeadlineError"] == 4
    assert codes["InternalError"] == 1
    assert 0 not in codes.values()


def test_unknown_options_are_usage_errors():
    """Exit code 2, as for wrong values."""
    assert command("generate", "--nonsense").returncode == 2
    assert command("generate", "x", "--rule", "fair").returncode == 2
    assert command("plan", "x", "--max-length", "0").returncode == 2
    assert command("demo", "--models", "/does/not/exist").returncode == 2


def test_version():
    """The package's."""
    assert command("--version").stdout.strip() == specpair.__version__


def test_without_the_extra_it_says_what_is_missing():
    """One line and exit code 2 where typer is not installed."""
    code = "import sys; sys.modules['typer'] = None; from specpair.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the specpair command needs the extra cli: pip install 'specpair[cli]'\n"
