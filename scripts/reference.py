"""Write the pages that are made from the code: docs/cli.md and the entries of docs/troubleshooting.md.

    python scripts/reference.py [--check]

The flags are those that the command line is made of; the entries are the errors in the source, by the file that raises
them. tests/docs/test_reference.py compares both pages with the code.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from kdcache.errors import entry_of
from kdcache_cli.app import app

ROOT = Path(__file__).parents[1]
CLI, TROUBLE = ROOT / "docs" / "cli.md", ROOT / "docs" / "troubleshooting.md"
PACKAGES = {"kdcache": "kdcache", "kdcache_kernels": "kernels/kdcache_kernels", "kdcache_cli": "cli/kdcache_cli"}
MARK = "<!-- What follows is written by scripts/reference.py. -->\n"
HEAD = f"""# Command line

Every verb with its flags, as `kdcache VERB --help` shows them. In recipe files the same names are keys. `--quiet`,
`--debug` and `--trust` may stand anywhere. The shell completes verbs, flags and values after
`--install-completion`.

{MARK}"""


def cli_page() -> str:
    """docs/cli.md: the verbs in the order of work, their flags by the panels of the help."""
    group: Any = get_command(app)
    context = typer.Context(group, info_name="kdcache")
    parts, heading = [HEAD], None
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command.rich_help_panel != heading:
            heading = command.rich_help_panel
            parts.append(f"## {heading}\n")
        own = getattr(command, "commands", None)
        verbs = {name: command} if own is None else {f"{name} {verb}": own[verb] for verb in own}
        parts += [_verb(verb, context, each) for verb, each in verbs.items()]
    return "\n".join(parts)


def _verb(name: str, parent: typer.Context, command: Any) -> str:
    context = typer.Context(command, info_name=name, parent=parent)
    lines = [f"### kdcache {name}\n", _help(command.help)]
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False) and parameter.name != "help":
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(parameter)
    for panel, parameters in panels.items():
        lines += [f"**{panel}**\n"] if panel else []
        lines += ["| flag | |", "| --- | --- |"]
        lines += [_row(parameter, context) for parameter in parameters]
        lines.append("")
    return "\n".join(lines)


def _help(text: str) -> str:
    """A docstring in the markup of rich as Markdown: examples become blocks of code."""
    text = re.sub(r"\s*\[dim\](.*?)\[/\]", lambda example: f"\n\n```text\n{example[1]}\n```\n", text, flags=re.DOTALL)
    return re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", text).strip() + "\n"


def _row(parameter: Any, context: typer.Context) -> str:
    flag, words = parameter.get_help_record(context)
    words = re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", " ".join(words.split()))
    return f"| `{_cell(' '.join(flag.split()))}` | {_cell(words)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def errors() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Entry -> the first line of its file's docstring, and (rule, remedy) of each error; what varies is an ellipsis."""
    entries = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            tree = ast.parse(path.read_text(encoding="utf-8"))
            raised = list(dict.fromkeys(_raised(tree)))
            if raised:
                module = ".".join((package, *parts)).removesuffix(".__init__")
                entries[entry_of(module)] = ((ast.get_docstring(tree) or "").partition("\n")[0], raised)
    return dict(sorted(entries.items()))


def _raised(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Rule and remedy of every error that a file makes, in its order."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        named = {word.arg: word.value for word in call.keywords}
        if isinstance(call.func, ast.Name) and call.func.id.endswith("Error") and "remedy" in named and call.args:
            yield _text(call.args[0], constants), _text(named["remedy"], constants)


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """A text as far as the source fixes it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return re.sub("(…)+", "…", "".join(_text(part, constants) for part in node.values))
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant | ast.JoinedStr):
        return _text(constants[node.id], constants)
    return "…"


def error_entries() -> str:
    """The entries of docs/troubleshooting.md, by room."""
    lines, room = [], None
    for entry, (about, raised) in errors().items():
        if entry.partition(".")[0] != room:
            room = entry.partition(".")[0]
            lines.append(f"## {room[2:]}\n")
        lines.append(f"### {entry} {{ #{entry} }}\n\n{_plain(about.replace('`', ''))}\n")
        lines += [f"- **{_plain(rule)}**" + f" Remedy: {_plain(remedy)}" * (remedy != "…") for rule, remedy in raised]
        lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text without meaning to Markdown, in one line."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def trouble_page() -> str:
    """docs/troubleshooting.md: what is written by hand, and the entries."""
    return TROUBLE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + "\n" + error_entries()


def main() -> None:
    """Write both pages, or with --check compare them."""
    for path, text in ((CLI, cli_page()), (TROUBLE, trouble_page())):
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not that of the code: run scripts/check --fix")


if __name__ == "__main__":
    main()
