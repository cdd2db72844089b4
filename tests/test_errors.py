"""An error keeps its parts. Strings from elsewhere are plain text wherever errors and logs show them."""

from __future__ import annotations

import pickle

import pytest

from kdcache.errors import DataError, one_line, plain_logger, suggest


def test_an_error_says_its_problem_then_its_fix() -> None:
    error = DataError("Unknown class 'cra'.", fix=suggest("cra", ["car", "sky"]), rule="A class is one of the list.")
    assert str(error) == "Unknown class 'cra'.\n  fix: Did you mean car?\n  A class is one of the list."
    for copy in (pickle.loads(pickle.dumps(error)), error.within("list.txt", fix="Correct it.")):
        assert type(copy) is DataError
        assert copy.rule == "A class is one of the list."
    assert str(error.within("list.txt")).startswith("list.txt: Unknown class 'cra'.\n  fix: Did you mean car?")
    assert str(DataError("No images.", fix="Add one.")) == "No images.\n  fix: Add one."
    assert suggest("zebra", ["car", "sky"], "There are: car, sky.") == "There are: car, sky."


def test_a_log_line_is_one_plain_line(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("kdcache.training", "kdcache.store", "kdcache.more"):
        plain_logger(name).warning("%s is read", "a\x1b]0;t\x07\nERROR forged 100 %s\r")
    assert {record.getMessage() for record in caplog.records} == {"a]0;t ERROR forged 100 %s is read"}
    assert len(caplog.records) == 3


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\t", "\v", "\f", "\x85", "\u2028", "\u2029", "\x1b"])
def test_every_line_end_is_gone(end: str) -> None:
    assert len(one_line(f"a{end}b").splitlines()) == 1
    assert one_line(f"a{end}b").startswith("a")
