"""The `specpair` command against real services: what it prints, how it exits, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from specpair import SamplingParams, SpeculativeClient

from .processes import DEMO, environment, leftovers, run, script, wait_for

SPECPAIR = script("specpair")
TEXT = "import os\nimport sys\n\n\ndef main():\n    "
TOKENS = 12


def specpair(*arguments, stdin=None, timeout=180, **extra):
    """Runs the command to its end."""
    given = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        [SPECPAIR, *arguments], capture_output=True, timeout=timeout, env=environment(**extra), **given
    )


@pytest.fixture(scope="module")
def expected(bf16_target):
    """The target's own continuation of TEXT."""

    async def alone():
        async with SpeculativeClient(bf16_target.address, "none") as client:
            return await client.generate(TEXT, SamplingParams(max_new_tokens=TOKENS))

    return run(alone())


class TestGenerate:
    """`specpair generate`."""

    @pytest.mark.parametrize("kind", ["model", "ngram", "none"])
    def test_json(self, bf16, expected, kind):
        """`--json` prints one object with text, ids, reason and statistics, the same for every draft."""
        target, draft = bf16(kind)
        flags = [f"--target={target}", f"--draft={draft}", f"--max-new-tokens={TOKENS}", "--json"]
        done = specpair("generate", TEXT, *flags)
        assert (done.returncode, done.stderr) == (0, b"")
        [line] = done.stdout.splitlines()
        printed = json.loads(line)
        assert printed["token_ids"] == list(expected.token_ids)
        assert printed["text"] == expected.text
        assert printed["prompt_tokens"] == len(expected.prompt_token_ids)
        assert printed["finish_reason"] == expected.finish_reason
        stats = printed["stats"]
        assert stats["tokens_per_second"] > 0
        assert 0 <= stats["accepted"] <= stats["proposed"]
        assert stats["rounds"] >= 1
        assert (stats["proposed"] > 0) == (kind == "model") or kind == "ngram"

    def test_prompts(self, bf16, expected, tmp_path):
        """An argument, a file and standard input give the same text; so do their ids."""
        file = tmp_path / "prompt.py"
        file.write_text(TEXT)
        target, draft = bf16("ngram")
        flags = [f"--target={target}", f"--draft={draft}", f"--max-new-tokens={TOKENS}"]
        for done in (
            specpair("generate", TEXT, *flags),
            specpair("generate", "--prompt-file", file, *flags),
            specpair("generate", "--prompt-file", "-", *flags, stdin=TEXT.encode()),
        ):
            assert (done.returncode, done.stderr) == (0, b"")
            assert done.stdout.decode() == expected.text + "\n"
        done = specpair("generate", TEXT, *flags, "--ids")
        assert done.stdout.decode().split() == [str(id_) for id_ in expected.token_ids]

    def test_sampling_and_ends(self, bf16):
        """Temperature, seed, top-k, top-p, stop strings and draft length reach the target."""
        target, draft = bf16("model")

        def generate(*flags):
            done = specpair("generate", TEXT, f"--target={target}", f"--draft={draft}", "--json", *flags)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        sampling = ["--temperature=1.5", "--top-k=50", "--top-p=0.9", "--seed=3", "--ignore-eos"]
        params = SamplingParams(temperature=1.5, top_k=50, top_p=0.9, seed=3, max_new_tokens=TOKENS, ignore_eos=True)

        async def alone():
            async with SpeculativeClient(target, "none") as client:
                return await client.generate(TEXT, params)

        result = run(alone())
        printed = generate(*sampling, f"--max-new-tokens={TOKENS}", "--draft-length=3")
        assert printed["token_ids"] == list(result.token_ids)
        assert printed["finish_reason"] == "max_new_tokens"
        stop = result.text[len(result.text) // 2 :][:3]
        printed = generate(*sampling, f"--max-new-tokens={TOKENS}", f"--stop={stop}", "--stop=\u2603")
        assert printed["finish_reason"] == "stop_string"
        assert printed["stop_string"] == stop
        assert printed["text"] == result.text[: result.text.find(stop)]

    @pytest.mark.parametrize(
        ("arguments", "field"),
        [
            (["generate", ""], "start.prompt.text"),
            (["generate"], "prompt"),
            (["generate", "x", "--prompt-file=-"], "prompt"),
            (["generate", "--prompt-file=/no/such/file"], "prompt_file"),
            (["generate", "x", "--temperature=-1"], "start.sampling.temperature"),
            (["generate", "x", "--max-new-tokens=0"], "start.sampling.max_new_tokens"),
            (["generate", "x", "--top-p=2"], "start.sampling.top_p"),
            (["generate", "x", "--draft-length=-1"], "draft_length"),
        ],
    )
    def test_bad_input(self, bf16, arguments, field):
        """Exit code 2 and one line that names the field."""
        done = specpair(*arguments, f"--target={bf16.target.address}", "--draft=ngram")
        assert done.returncode == 2
        assert done.stdout == b""
        [line] = done.stderr.decode().splitlines()
        assert line.startswith(f"error: {field}: ")

    def test_out_of_time(self, bf16):
        """Exit code 4."""
        done = specpair(
            "generate", TEXT, f"--target={bf16.target.address}", "--draft=none", "--ignore-eos", "--timeout=0.05"
        )
        assert done.returncode == 4
        assert done.stderr.startswith(b"error: ")

    def test_unreachable(self, bf16, expected):
        """Without a target exit code 3; without a draft a warning and the same text."""
        with socket.socket() as reserved:  # bound, but not listening
            reserved.bind(("127.0.0.1", 0))
            nobody = f"127.0.0.1:{reserved.getsockname()[1]}"
            for draft in (bf16.draft.address, "none"):
                done = specpair("generate", TEXT, f"--target={nobody}", f"--draft={draft}")
                assert done.returncode == 3
                assert done.stdout == b""
                [line] = done.stderr.decode().splitlines()
                assert line.startswith("error: ")
            target = f"--target={bf16.target.address}"
            done = specpair("generate", TEXT, target, f"--draft={nobody}", f"--max-new-tokens={TOKENS}")
            assert done.returncode == 0
            assert done.stdout.decode() == expected.text + "\n"
            assert b"draft unreachable" in done.stderr

    def test_interrupted(self, bf16):
        """Ctrl-C ends the calls and the command."""
        command = [SPECPAIR, "generate", TEXT, f"--target={bf16.target.address}", f"--draft={bf16.draft.address}"]
        process = subprocess.Popen(
            [*command, "--ignore-eos", "--max-new-tokens=400"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in error
        for service in (bf16.target, bf16.draft):
            service.wait_until_free()


def test_info(bf16):
    """`specpair info` shows both services, `--json` as one object; null for a draft that is not there."""
    target, draft = bf16("model")
    done = specpair("info", f"--target={target}", f"--draft={draft}", "--json")
    assert done.returncode == 0
    printed = json.loads(done.stdout)
    assert printed["target"]["model"] == str(DEMO / "target")
    assert printed["target"]["slots"] == 8
    assert printed["draft"]["model"] == str(DEMO / "draft")
    assert printed["target"]["fingerprint"] == printed["draft"]["fingerprint"]
    alone = json.loads(specpair("info", f"--target={target}", "--draft=none", "--json").stdout)
    assert alone["target"]["model"] == printed["target"]["model"]
    assert alone["draft"] is None
    table = specpair("info", f"--target={target}", f"--draft={draft}").stdout.decode()
    assert "LlamaForCausalLM" in table


class TestDemo:
    """`specpair demo`, which brings its own services."""

    def test_json(self):
        """`--json` prints one object with the measured figures and leaves no process."""
        process = subprocess.Popen(
            [SPECPAIR, "demo", "--json", "--max-new-tokens=8", "--repeats=1", "--prompts=2", "--threads=1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        [line] = output.splitlines()
        printed = json.loads(line)
        for name in ("speedup", "target_alone_tokens_per_second", "pair_tokens_per_second"):
            assert printed[name] > 0
        assert 0 <= printed["acceptance_rate"] <= 1
        assert printed["tokens_identical"] is True
        assert not leftovers(process.pid)

    def test_interrupted(self):
        """Ctrl-C during the start stops both services too."""
        process = subprocess.Popen(
            [SPECPAIR, "demo"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
        try:
            wait_for(lambda: len(_members(process.pid)) == 3, 60, "two services beside the command")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            wait_for(lambda: not leftovers(process.pid), 10, "nothing left")
        finally:
            if leftovers(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def test_no_models(self, tmp_path):
        """Without models it says which directory it missed, with exit code 2."""
        done = specpair("demo", f"--models={tmp_path}")
        assert done.returncode == 2
        assert done.stderr.decode().startswith("error: models: ")
        assert str(tmp_path) in done.stderr.decode()


def _members(group):
    """Ids of the processes of a group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members
