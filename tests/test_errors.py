"""An error keeps its parts. Strings from elsewhere are plain text wherever errors and logs show them."""

from __future__ import annotations

import pickle

import pytest

from kdcache.errors import DataError, one_line, plain_logger


def test_an_error_crosses_a_process_boundary_with_its_parts() -> None:
    error = DataError("The rule.", received="this", remedy="Do that.")
    assert str(error) == "The rule.\n  received: this\n  remedy:   Do that."
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (DataError, str(error))
    again = error.restated(received="elsewhere")
    assert (type(again), again.rule, again.received, again.remedy) == (DataError, "The rule.", "elsewhere", "Do that.")
    assert error.restated(received="elsewhere", remedy="Go there.").remedy == "Go there."


def test_a_log_line_is_one_plain_line(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("kdcache.training", "kdcache.store", "kdcache.more"):
        plain_logger(name).warning("%s is read", "a\x1b]0;t\x07\nERROR forged 100 %s\r")
    assert {record.getMessage() for record in caplog.records} == {"a]0;t ERROR forged 100 %s is read"}
    assert len(caplog.records) == 3


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\t", "\v", "\f", "\x85", "\u2028", "\u2029", "\x1b"])
def test_every_line_end_is_gone(end: str) -> None:
    assert len(one_line(f"a{end}b").splitlines()) == 1
    assert one_line(f"a{end}b").startswith("a")
