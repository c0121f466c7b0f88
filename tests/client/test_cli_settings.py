"""Laws of the command's options: by flag, in the environment, in a file."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from typer import Context
from typer.main import get_command

from specpair.client import ClientOptions, SpeculativeClient
from specpair.commands import app
from specpair.commands.configuring import keys
from specpair.commands.options import Speculating
from specpair.params import SamplingParams

from .commanding import command
from .fakes import continuation
from .loopback import DraftServicer, TargetServicer, serving
from .test_cli import PROMPT, PROMPT_IDS

COMMANDS = get_command(app).commands
OPTIONS = [(name, key) for name, one in COMMANDS.items() for key in keys(one)]


@pytest.fixture(scope="module")
def address():
    with serving(TargetServicer(), DraftServicer()) as opened:
        yield opened


def generated(address, *arguments, **environment):
    """Ids of a generation."""
    given = {"SPECPAIR_TARGET": address, "SPECPAIR_DRAFT": "ngram", "SPECPAIR_GENERATE_IDS": "1", **environment}
    done = command("generate", PROMPT, *arguments, **given)
    assert (done.returncode, done.stderr) == (0, "")
    return [int(word) for word in done.stdout.split()]


def test_flag_environment_file_default(address, tmp_path):
    """Each goes before the next: what a flag says, the environment, the file's table of the command, its top."""
    file = tmp_path / "some.toml"
    file.write_text("max_new_tokens = 3\nseed = 1\n[generate]\nmax_new_tokens = 4\n")
    config = ["--config", str(file)]
    assert len(generated(address)) == 128
    assert generated(address, *config) == continuation(PROMPT_IDS, 4, seed=1)
    assert len(generated(address, *config, SPECPAIR_MAX_NEW_TOKENS="5")) == 5
    assert len(generated(address, *config, "--max-new-tokens", "6", SPECPAIR_MAX_NEW_TOKENS="5")) == 6
    assert len(generated(address, SPECPAIR_CONFIG=str(file))) == 4
    assert len(generated(address, *config, SPECPAIR_MAX_NEW_TOKENS="")) == 4  # empty is as if it were not there


def test_the_users_own_file(address, tmp_path):
    """Without --config it is read from where the system keeps settings; a file that is named goes in its place."""
    (tmp_path / "specpair").mkdir()
    (tmp_path / "specpair" / "config.toml").write_text("max_new_tokens = 2\n")
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert len(generated(address, **home)) == 2
    other = tmp_path / "other.toml"
    other.write_text("seed = 2\n")
    assert len(generated(address, "--config", str(other), **home)) == 128


def test_the_top_is_of_shared_options_alone(tmp_path):
    """What a command means by a name that others share is its own: only its table says it."""
    file = tmp_path / "some.toml"
    file.write_text('draft = "127.0.0.1:1"\ntemperature = 0.7\nmax_new_tokens = 3\n[bench]\nmax_new_tokens = 4\n')
    for name, expected in (("generate", ("127.0.0.1:1", "0.7", "3")), ("explain", (None, "0.7", None))):
        context = COMMANDS[name].make_context(name, ["x", "--config", str(file)], parent=Context(get_command(app)))
        known = context.default_map
        assert (known.get("draft"), known.get("temperature"), known.get("max_new_tokens")) == expected
    context = COMMANDS["bench"].make_context("bench", ["--config", str(file)], parent=Context(get_command(app)))
    assert context.default_map == {"draft": "127.0.0.1:1", "max_new_tokens": "4"}


def test_a_file_has_every_kind_of_value(tmp_path):
    """Numbers, texts, switches and lists reach the target; what may be repeated is a list, blanks included."""
    file = tmp_path / "all.toml"
    file.write_text(
        'temperature = 0.5\ntop_k = 4\nrule = "rejection"\nlogit_bias = ["7=-1.5", "9=2"]\nignore_eos = true\n'
        'stop = ["\\n\\n", "a b"]\nstop_token_id = [48]\nlookup = true\n[generate]\njson = true\n[bench]\nrepeats = 2\n'
    )
    servicer = TargetServicer()
    with serving(servicer) as address:
        done = command("generate", PROMPT, "--target", address, "--draft", "ngram", "--config", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["text"]
    [start] = servicer.starts
    assert list(start.stop.stop_strings) == ["\n\n", "a b"]
    assert list(start.stop.stop_token_ids) == [48]
    assert start.stop.ignore_eos
    assert dict(start.sampling.logit_bias) == {7: -1.5, 9: 2.0}
    assert (start.sampling.temperature, start.sampling.top_k) == (0.5, 4)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("max_tokens = 3", "error: max_tokens: unknown setting (from {file})"),
        ("[generate]\nsweeps = 1", "error: generate.sweeps: unknown setting (from {file})"),
        ("repeats = 3", "error: repeats: unknown setting (from {file})"),  # bench's own, and demo's
        ("[generat]\nseed = 1", "error: generat: unknown setting (from {file})"),
        ("config = 'x'", "error: config: unknown setting (from {file})"),
        ("seed = 'x'", "error: seed: "),
        ("seed = 1.5", "error: seed: "),
        ("seed = true", "error: seed: must not be true or false, got True (from {file})"),
        ("seed = [1]", "error: seed: must not be a list, got [1] (from {file})"),
        ("[target]\nhost = 'x'", "error: target: must not be a table, got {{'host': 'x'}} (from {file})"),
        ("ignore_eos = 1", "error: ignore_eos: must be true or false, got 1 (from {file})"),
        ("stop = 'x'", "error: stop: must be a list, got 'x' (from {file})"),
        ("rule = 'fair'", "error: rule: 'fair' is not one of"),
        ("seed = ", "error: config: {file} is not TOML: "),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, text, error):
    """One line with the key and the file, exit code 2."""
    file = tmp_path / "bad.toml"
    file.write_text(text)
    done = command("generate", PROMPT, "--target", "127.0.0.1:1", "--config", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(error.format(file=file))
    assert str(file) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_not_there():
    """A file that was named has to be there."""
    done = command("info", "--config", "/does/not/exist.toml")
    assert (done.returncode, done.stderr) == (
        2,
        "error: config: cannot read /does/not/exist.toml: No such file or directory\n",
    )


def test_wrong_values_in_the_environment():
    """A usage error that names the variable."""
    done = command("info", SPECPAIR_CONNECT_TIMEOUT="soon")
    assert done.returncode == 2
    assert "SPECPAIR_CONNECT_TIMEOUT" in done.stderr


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_every_option_has_a_variable(name, key):
    """SPECPAIR_OPTION if commands share it, else SPECPAIR_COMMAND_OPTION; never one that reads like a service's."""
    found = keys(COMMANDS[name])[key].envvar
    assert found in {f"SPECPAIR_{part}{key.upper()}" for part in ("", "CLIENT_", f"{name.upper()}_")}
    assert not re.match("SPECPAIR_(TARGET|DRAFT|GATEWAY)_", found)


def test_one_variable_means_one_thing():
    """Options of several commands with one variable are of one kind."""
    kinds = {}
    for name, key in OPTIONS:
        option = keys(COMMANDS[name])[key]
        kinds.setdefault(option.envvar, set()).add((key, option.is_flag, option.multiple))
    assert {variable: kind for variable, kind in kinds.items() if len(kind) > 1} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_everything(name):
    """Every flag with its variable, whole, where lines have 80 columns."""
    shown = " ".join(command(name, "--help", COLUMNS="80", LINES="24").stdout.split())
    for option in COMMANDS[name].params:
        if option.param_type_name == "option":
            assert all(flag in shown for flag in [*option.opts, *option.secondary_opts])
            assert option.envvar is None or option.envvar in shown
    assert "--config" in shown


def test_clients_can_be_told_everything():
    """Every option of a client, but for objects, is an option of generate and chat; so is every sampling parameter."""
    annotations = {name: kind.__forward_arg__.split(" | ") for name, kind in ClientOptions.__annotations__.items()}
    flags = {name for name, kinds in annotations.items() if {*kinds} <= {"int", "float", "bool", "str", "None"}}
    assert {"draft_length", "lookup", "chain", "draft_timeout", "resume_timeout", "connect_timeout"} <= flags
    for name in ("generate", "chat"):
        given = set(keys(COMMANDS[name]))
        assert flags <= given
        known = {{"stop_token_ids": "stop_token_id"}.get(field, field) for field in SamplingParams.__slots__}
        assert known - given <= {"logprobs"}
    defaults = {name: one.default for name, one in inspect.signature(SpeculativeClient.__init__).parameters.items()}
    assert all(defaults[name] == value for name, value in Speculating().options.items())
