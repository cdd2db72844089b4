"""What the parser refuses and what nobody foresaw end in the panel of every error."""

from __future__ import annotations

import errno

import pytest

from kdcache_cli.app import main


@pytest.mark.parametrize(
    ("typed", "problem", "fix"),
    [
        ("plan --bacth-size 3", "Unknown flag --bacth-size", "Did you mean --batch-size?"),
        ("train-student --itterations 3", "Unknown flag --itterations", "Did you mean --iterations?"),
        ("plan --zzz 3", "Unknown flag --zzz", "Leave it out. See kdcache plan --help"),
        ("plan", "Missing --data", "Add it. See kdcache plan --help"),
        ("models --qiet", "Unknown flag --qiet", "Did you mean --quiet?"),
        ("report", "Missing RUN", "Add it. See kdcache report --help"),
        (
            "plan --batch-size x",
            "Invalid value of --batch-size: 'x'",
            "Give a whole number from 1 on. See kdcache plan",
        ),
        ("plan --batch-size", "Missing value of --batch-size", "Add it after --batch-size. See kdcache"),
        ("plan --records 3", "Invalid value of --records: '3'", "Give a whole number from 8 to 256. See kdcache"),
        ("train-student --resume=3", "--resume takes no value", "Write --resume alone. See kdcache train-student"),
        ("reprot runs", "Unknown command reprot", "Did you mean report?"),
        ("data chek x", "Unknown command chek", "Did you mean check?"),
        ("data zzz", "Unknown command zzz", "Correct it. See kdcache data --help"),
        ("--zzz", "Unknown flag --zzz", "Leave it out. See kdcache --help"),
        ("models a b", "Unexpected argument b", "Leave it out, or quote it. See kdcache models"),
    ],
)
def test_what_the_parser_refuses_names_the_words_and_the_fix(
    typed: str, problem: str, fix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache_cli.app.ERRORS.width", 200)
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert f" {problem}" in shown
    assert f"fix: {fix}" in shown


def test_what_nobody_foresaw_has_a_panel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    disk, defect = "Cannot read or write a file: ", "This should not have happened: "
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, rule in ((PermissionError("no"), disk), (full, disk), (None, defect)):

        def fail(*_: object, error: Exception | None = error) -> None:
            assert error is not None
            raise error

        # A call of None fails in our own line: what fails in this file is the user's own code.
        monkeypatch.setattr("kdcache_cli.verbs.models.list_models", None if error is None else fail)
        with pytest.raises(SystemExit) as ended:
            main(["models"])
        assert ended.value.code == 2
        assert rule in capsys.readouterr().err


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    for typed in ([], ["data"]):
        with pytest.raises(SystemExit):
            main(typed)
        shown = capsys.readouterr()
        assert "Usage" in shown.out + shown.err
        assert "fix: " not in shown.out + shown.err
