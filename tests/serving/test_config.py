"""Flag before environment before file before default, and problems that name their field."""

from __future__ import annotations

import pytest


@pytest.fixture
def parse(fake, monkeypatch):
    """FakeConfig.parse in an environment of its own."""
    for name in ("LISTEN", "THREADS", "VERIFY_WIDTH", "REFLECTION", "CONFIG"):
        monkeypatch.delenv(f"SPECPAIR_FAKE_{name}", raising=False)
    return lambda *argv: fake.FakeConfig.parse(argv, "fake")


@pytest.fixture
def refused(parse, capsys):
    """Lines on stderr and exit status of a parse that fails."""

    def run(*argv):
        with pytest.raises(SystemExit) as end:
            parse(*argv)
        return capsys.readouterr().err.splitlines(), end.value.code

    return run


def test_precedence(parse, monkeypatch, tmp_path):
    """A flag wins over the environment, that over the file, that over the default."""
    file = tmp_path / "service.toml"
    file.write_text("verify_width = 4\nthreads = 4\ngrace = 4.5\n")
    assert parse().verify_width == 8
    assert parse(f"--config={file}").verify_width == 4
    monkeypatch.setenv("SPECPAIR_FAKE_VERIFY_WIDTH", "16")
    assert parse().verify_width == 16
    assert parse(f"--config={file}").verify_width == 16
    config = parse(f"--config={file}", "--verify-width", "32")
    assert (config.verify_width, config.threads, config.grace) == (32, 4, 4.5)


def test_config_file_from_the_environment(parse, monkeypatch, tmp_path):
    """The file may be named in the environment; the flag wins there too."""
    for name, width in (("env", 4), ("flag", 5)):
        (tmp_path / f"{name}.toml").write_text(f"verify_width = {width}\n")
    monkeypatch.setenv("SPECPAIR_FAKE_CONFIG", str(tmp_path / "env.toml"))
    assert parse().verify_width == 4
    assert parse("--config", str(tmp_path / "flag.toml")).verify_width == 5


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--verify-width", "12"], "verify_width", 12),
        (["--verify-width=12"], "verify_width", 12),
        (["--reflection"], "reflection", True),
        (["--no-reflection"], "reflection", False),
        (["--log-format=json"], "log_format", "json"),
        (["--grace", "0.5"], "grace", 0.5),
        ([], "idle_timeout", 600.0),
        (["--idle-timeout", "0"], "idle_timeout", 0.0),
        ([], "max_connection_age", 0.0),
        (["--max-connection-age=3600"], "max_connection_age", 3600.0),
        (["--max-connection-age-grace=60"], "max_connection_age_grace", 60.0),
        (["--listen", "[::]:0"], "listen", "[::]:0"),
        (["--listen", "unix:/run/x.sock"], "listen", "unix:/run/x.sock"),
    ],
)
def test_flags(parse, argv, field, value):
    """Flags are the fields in kebab case, with the value beside or after `=`, booleans with a `no-` form."""
    assert getattr(parse(*argv), field) == value


def test_boolean_from_the_environment(parse, monkeypatch):
    """A boolean can be switched off in the environment and on again by its flag; an empty variable counts as unset."""
    monkeypatch.setenv("SPECPAIR_FAKE_REFLECTION", "false")
    monkeypatch.setenv("SPECPAIR_FAKE_THREADS", "")
    assert parse().reflection is False
    assert parse().threads is None
    assert parse("--reflection").reflection is True


def test_help_shows_defaults_and_variables(parse, capsys):
    """--help names every flag with its default and its environment variable, and exits with 0."""
    with pytest.raises(SystemExit) as end:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "--listen TEXT Address to serve on" in shown
    assert "[default: 127.0.0.1:50051; SPECPAIR_FAKE_LISTEN]" in shown
    assert "--verify-width N Rows of one verify step. [default: 8; SPECPAIR_FAKE_VERIFY_WIDTH]" in shown
    assert "{auto,console,json}" in shown
    assert "--reflection, --no-reflection" in shown
    assert "[default: on; SPECPAIR_FAKE_REFLECTION]" in shown
    assert "How long 100% of loading takes." in shown
    assert "[SPECPAIR_FAKE_CONFIG]" in shown


def test_every_problem_is_named(refused, monkeypatch, tmp_path):
    """Each bad value is one line with field, message, value and where it came from; exit status 2."""
    (tmp_path / "service.toml").write_text('grace = -1\nverify_widht = 8\nlog_level = "loud"\n')
    monkeypatch.setenv("SPECPAIR_FAKE_THREADS", "many")
    lines, status = refused("--verify-width=1", f"--config={tmp_path / 'service.toml'}", "--listen=here")
    assert status == 2
    assert len(lines) == 6
    assert all(line.startswith("error: ") for line in lines)
    text = "\n".join(lines)
    assert "error: verify_width: should be greater than or equal to 2, got '1' (from --verify-width)" in text
    assert "error: listen: must be HOST:PORT" in text
    assert "error: threads: should be a valid integer" in text
    assert "(from SPECPAIR_FAKE_THREADS)" in text
    assert f"got -1 (from {tmp_path / 'service.toml'})" in text
    assert "error: verify_widht: unknown setting" in text
    assert "error: log_level: should be 'debug', 'info', 'warning' or 'error', got 'loud'" in text


def test_missing_value_says_how_to_give_it(fake, capsys):
    """A required setting that is missing is reported with every way to set it."""

    class Config(fake.FakeConfig):
        model: str

    with pytest.raises(SystemExit):
        Config.parse([], "fake")
    line = "error: model: is required: set --model, SPECPAIR_FAKE_MODEL or the configuration file\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("argv", [["--verify-widht=8"], ["--verify=8"], ["8"], ["--verify-width"]])
def test_unknown_flags_are_refused(refused, argv):
    """Unknown, abbreviated, positional and incomplete arguments end with `error:` and exit status 2."""
    lines, status = refused(*argv)
    assert lines[0].startswith("error: ")
    assert status == 2


def test_unusable_file(refused, tmp_path):
    """A file that is missing or not TOML is reported as the problem of `config`."""
    (tmp_path / "bad.toml").write_text("verify_width 8")
    lines, status = refused(f"--config={tmp_path / 'none.toml'}")
    assert (lines, status) == ([f"error: config: cannot read {tmp_path / 'none.toml'}: No such file or directory"], 2)
    lines, status = refused(f"--config={tmp_path / 'bad.toml'}")
    assert lines[0].startswith(f"error: config: {tmp_path / 'bad.toml'} is not TOML: ")


def test_frozen(parse):
    """A configuration cannot be changed after it was read."""
    with pytest.raises(ValueError, match="frozen"):
        parse().grace = 3
