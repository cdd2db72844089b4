"""A hook of the documentation site: the reference of the command line, one page per verb, made from the code.

The pages are virtual. cli/index.md lists the verbs, cli/VERB.md has a verb's flags as its help shows them.
"""

import re
from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.structure.files import File
from typer.main import get_command

from kdcache_cli.app import app

INDEX = "cli/index.md"
INTRODUCTION = """# Command line

Every verb has a page with its flags, as `kdcache VERB --help-all` shows them. A recipe file has the same names as keys.
You can add `--quiet`, `--debug` and `--trust` to any command. Your shell completes verbs, flags and values after
`kdcache --install-completion`.
"""


def on_config(config: Any) -> Any:
    """Put the commands under "Command line" in the navigation."""
    links = [page.partition("/")[2] for page in pages() if page != INDEX]
    verbs = [{link.removesuffix(".md"): f"cli/{link}"} for link in links]
    for section in config["nav"]:
        for entries in section.values():
            if INDEX in entries:
                entries[entries.index(INDEX)] = {"Command line": [INDEX, *verbs]}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the commands to the site."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Return the text of each page by its path below docs/, in the order of work."""
    group: Any = get_command(app)
    context = typer.Context(group, info_name="kdcache")
    texts = {INDEX: ""}
    index, heading = [INTRODUCTION], None
    for name, command in _verbs(group, context):
        if command.rich_help_panel != heading:
            heading = command.rich_help_panel
            index.append(f"\n## {heading}\n\n| verb | |\n| --- | --- |")
        link = name.replace(" ", "-")
        summary = _markdown(command.help).partition("\n\n")[0]
        index.append(f"| [`{name}`]({link}.md) | {_cell(summary)} |")
        texts[f"cli/{link}.md"] = _page(name, context, command)
    return texts | {INDEX: "\n".join(index) + "\n"}


def _verbs(group: Any, context: typer.Context) -> Iterator[tuple[str, Any]]:
    """Yield the name of every command (one word or two) and the command, with the panel of its group."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        for verb, member in getattr(command, "commands", {"": command}).items():
            member.rich_help_panel = command.rich_help_panel
            yield f"{name} {verb}".strip(), member


def _page(name: str, parent: typer.Context, command: Any) -> str:
    context = typer.Context(command, info_name=name, parent=parent)
    lines = [f"# kdcache {name}\n", _markdown(command.help) + "\n"]
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False) and parameter.name not in ("help", "help_all"):
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Flags", []).append(parameter)
    for panel, parameters in panels.items():
        lines += [f"## {panel}\n", "| flag | what it does |", "| --- | --- |"]
        lines += [_row(parameter, context) for parameter in parameters]
        lines.append("")
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """Return a docstring in the markup of rich as Markdown: examples become blocks of code."""
    text = re.sub(r"\s*\[dim\](.*?)\[/\]", lambda example: f"\n\n```text\n{example[1]}\n```\n", text, flags=re.DOTALL)
    return re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", text).strip()


def _row(parameter: Any, context: typer.Context) -> str:
    flag, words = parameter.get_help_record(context)
    words = re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", words)
    return f"| `{_cell(flag)}` | {_cell(words)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
