"""Write the pages that are made from the code: docs/cli.md and the entries of docs/troubleshooting.md.

    python scripts/reference.py [--check]

The flags are those that the command line is made of; the entries are the errors in the source, by the first words of
their rules. tests/docs/test_reference.py compares both pages with the code.
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
PACKAGES = ("kdcache", "kernels/kdcache_kernels", "cli/kdcache_cli")
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


def errors() -> dict[str, dict[str, list[str]]]:
    """Entry -> rule -> its remedies, of every error in the source; what varies is an ellipsis.

    Raises: ValueError for an error whose entry varies: it is given `entry=`.
    """
    trees = [
        ast.parse(path.read_text("utf-8")) for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    shared = {name: helper for tree in trees for name, helper in _helpers(tree).items() if not name.startswith("_")}
    entries: dict[str, dict[str, list[str]]] = {}
    for tree in trees:
        for entry, rule, remedy in _raised(tree, shared | _helpers(tree)):
            remedies = entries.setdefault(entry, {}).setdefault(rule, [])
            remedies += [remedy] * (remedy not in ("…", *remedies))
    return dict(sorted(entries.items()))


def is_error(call: ast.Call) -> bool:
    """Whether a call makes an error of ours."""
    named = isinstance(call.func, ast.Name) and call.func.id.endswith("Error")
    return named and len(call.args) == 1 and any(word.arg == "remedy" for word in call.keywords)


def _calls(tree: ast.Module) -> Iterator[tuple[ast.Call, ast.FunctionDef | None]]:
    """Every call of a file by a plain name, and the innermost function that makes it."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    owners = {id(node): function for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node, owners.get(id(node))


def _parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def _helpers(tree: ast.Module) -> dict[str, tuple[ast.FunctionDef, ast.Call]]:
    """Name -> function and error, of the functions that get the rule of an error as an argument."""
    return {
        function.name: (function, call)
        for call, function in _calls(tree)
        if is_error(call) and function and getattr(call.args[0], "id", None) in _parameters(function)
    }


def _raised(tree: ast.Module, helpers: dict[str, tuple[ast.FunctionDef, ast.Call]]) -> Iterator[tuple[str, str, str]]:
    """Entry, rule and remedy of every error that a file makes, by itself or through a helper."""
    of_helpers = [error for _, error in helpers.values()]
    for call, owner in _calls(tree):
        given = {word.arg: word.value for word in call.keywords}
        if call in of_helpers or not (is_error(call) or call.func.id in helpers):
            continue
        texts = _constants(tree) | _constants(owner)
        if is_error(call):
            rule, made = call.args[0], given
        else:
            function, error = helpers[call.func.id]
            given |= dict(zip(_parameters(function), call.args, strict=False))
            given = {name: texts.get(getattr(node, "id", ""), node) for name, node in given.items()}
            texts |= _constants(function) | given
            rule, made = given[error.args[0].id], {word.arg: word.value for word in error.keywords}
        if "entry" in made and not isinstance(made["entry"], ast.Constant):
            continue  # the rule of another error, which has its entry
        for each in (rule.body, rule.orelse) if isinstance(rule, ast.IfExp) else (rule,):
            text = _text(each, texts)
            words = _text(made["entry"], {}) if "entry" in made else text
            yield entry_in_source(words), words if text == "…" else text, _text(made["remedy"], texts)


def entry_in_source(words: str) -> str:
    """The entry of a rule. Raises: ValueError when it depends on what varies in the rule."""
    entries = {entry_of(words.replace("…", filler)) for filler in ("", "x", "y z")}
    if len(entries) > 1:
        raise ValueError(f"the first words of {words!r} vary: give the error entry=")
    return entries.pop()


def _constants(scope: ast.Module | ast.FunctionDef | None) -> dict[str, ast.expr]:
    """Names that are given a value in a file, outside of functions, or in a function; and the value."""
    nodes = ast.walk(scope) if isinstance(scope, ast.FunctionDef) else scope.body if scope else ()
    assigned = [node for node in nodes if isinstance(node, ast.Assign)]
    return {target.id: node.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}


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
        others = {name: value for name, value in constants.items() if name != node.id}  # a text may extend itself
        return _text(constants[node.id], others)
    return "…"


def error_entries() -> str:
    """The entries of docs/troubleshooting.md, each with an anchor of its name."""
    lines = []
    for entry, rules in errors().items():
        anchor = f'<a id="{entry}"></a>'
        for rule, remedies in rules.items():
            remedy = " Remedy: " + "; or: ".join(map(_plain, remedies)) if remedies else ""
            lines.append(f"- {anchor}`{entry}`: **{_plain(rule)}**{remedy}")
            anchor = ""
    return "\n".join(lines) + "\n"


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
