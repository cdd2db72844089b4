"""What the parser refuses and what nobody foresaw end in the panel of every error."""

from __future__ import annotations

import errno

import pytest

from kdcache_cli.app import main


@pytest.mark.parametrize(
    ("typed", "received", "remedy"),
    [
        ("plan --bacth-size 3", "kdcache plan --bacth-size", "did you mean --batch-size?"),
        ("plan --zzz 3", "kdcache plan --zzz", "leave it out: kdcache plan --help lists"),
        ("plan", "kdcache plan without --data", "add it, as kdcache plan --help shows"),
        ("models --qiet", "kdcache models --qiet", "did you mean --quiet?"),
        ("report", "kdcache report without RUN", "add it, as kdcache report --help shows"),
        ("plan --batch-size x", "kdcache plan --batch-size x: ", "correct it"),
        ("plan --batch-size", "kdcache plan: Option '--batch-size' requires an argument", "correct it"),
        ("reprot runs", "kdcache: No such command 'reprot'.", "did you mean 'report'"),
        ("data chek x", "kdcache data: No such command 'chek'.", "did you mean 'check'"),
        ("--zzz", "kdcache --zzz", "leave it out: kdcache --help lists"),
        ("models a b", "kdcache models: Got unexpected extra argument", "correct it"),
    ],
)
def test_what_the_parser_refuses_names_the_words_and_the_fix(
    typed: str, received: str, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache_cli.app.ERRORS.width", 200)
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert received in shown
    assert remedy in shown


def test_what_nobody_foresaw_has_a_panel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    disk, defect = "files must be readable", "this should not have happened"
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
        assert "received" not in shown.out + shown.err
