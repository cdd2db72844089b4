"""An extension of the site's API pages: examples in docstrings become blocks of code.

A doctest without a heading is Markdown: its prompts are quotes, and a list that it prints is a link.
"""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Examples(griffe.Extension):
    """A griffe extension that puts the examples of every docstring into code blocks."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """Return a docstring with its examples as code blocks."""
    return _DOCTEST.sub(lambda example: f"```pycon\n{example[0]}\n```", docstring)
