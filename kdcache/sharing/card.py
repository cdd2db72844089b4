"""Cards of caches and runs in Markdown: what it is, how to train from it or train it again, how to cite it.

The card of a cache is README.md of its repository on the Hub, which reads its front matter.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tomli_w

from kdcache import display
from kdcache.display import bare, public, public_values
from kdcache.errors import plain_text
from kdcache.run_folder import ENVIRONMENT, RECIPE, VERBS, WEIGHTS, Run, weights_path
from kdcache.settings.recipe import source_of
from kdcache.sharing.rebuild import build_command
from kdcache.store.format.manifest import Manifest
from kdcache.store.summary import StoreSummary

_VERSIONS = ("kdcache", "python", "torch", "torchvision", "triton", "numba", "numpy", "pillow", "zarr", "numcodecs")


def store_card(store: StoreSummary, *, address: str | None = None, licence: str | None = None) -> str:
    """Return a cache's card in Markdown: what the cache holds, how to train from it, rebuild it and cite it.

    Args:
        store: the summary of the cache.
        address: the cache's public address, such as hf://datasets/USER/NAME, or None without one.
        licence: a licence's name on the Hub, such as "cc-by-4.0". With it, the card begins with front matter for the
            Hub.
    """
    m = store.manifest
    name = _name(address or store.path)
    title = f"{name}: outputs of {bare(m.teacher.spec)} on {m.dataset.name}"
    parts = [
        "" if licence is None else _front_matter(m, title, licence),
        f"# {_line(title)}",
        f"A kdcache cache: the outputs of one teacher on the {m.dataset.samples:,} samples of "
        f"{_line(m.dataset.name)}, split {_line(m.dataset.split)}, written once, so that any number of students are "
        "trained from them without teacher weights, a teacher's forward pass or its memory. A Zarr v3 group, which "
        "zarr-python reads, too.",
        "" if licence is None else _licence(m, licence),
        "## What it holds",
        _table(fact for fact in store.facts() if fact[0] != "cache"),
        "## Train from it",
        _train_from(m, name, address, store.seal),
        "## Build it again",
        _rebuild(m),
        "## Cite it",
        _bibtex(_key(name, store.seal or m.dataset.ids_digest), title, m.created[:4], m.created_by, address,
                "incomplete" if store.seal is None else f"seal sha256:{store.seal}"),
    ]  # fmt: skip
    return _joined(parts)


def run_card(run: Run) -> str:
    """Return a run's card in Markdown: what the model is, its results, how to train it again and cite it.

    Raises: RecipeError for a folder that is not a run, or a damaged run.
    """
    model, result, recipe = run.model, run.result, dict(run.recipe or {})
    name = run.folder.resolve().name
    title = f"{name}: {public(model.spec)}, trained on {_source(recipe)}"
    weights = {name_of_weights: weights_path(run.folder, name_of_weights) for name_of_weights in WEIGHTS}
    digests = {
        name_of_weights: hashlib.sha256(path.read_bytes()).hexdigest()
        for name_of_weights, path in weights.items()
        if path.is_file()
    }
    facts = [
        ("model", public(model.spec)),
        ("classes", ", ".join(model.class_names) or "none"),
        ("size", display.size_text(model.size)),
        ("seed", str(recipe.get("seed", "not recorded"))),
        ("trained on", f"{_source(recipe)}, digest {model.trained_on}" if model.trained_on else _source(recipe)),
        *(("learnt from the cache", f"seal sha256:{seal}") for seal in model.stores),
        *((("validated on", f"split of digest {model.validated_on}"),) if model.validated_on else ()),
        *((f"{name_of_weights}.safetensors", f"sha256:{digest}") for name_of_weights, digest in digests.items()),
    ]
    best = digests.get("best", digests.get("last", ""))
    parts = [
        f"# {_line(title)}",
        "A run of kdcache: a segmentation or depth model, its settings, its log and its weights.",
        "## What it is",
        _table(facts),
        "## Results",
        _results(run) if result else "The training has not ended.",
        "## Train it again",
        _retrain(run, recipe),
        "## Cite it",
        _bibtex(_key(name, best), title, "", _program(run), None, f"weights sha256:{best}" if best else "no weights"),
    ]
    return _joined(parts)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(manifest: Manifest, title: str, licence: str) -> str:
    """Return the front matter of a card for the Hub. Its values are JSON, which is also valid YAML."""
    tasks = ["image-segmentation"] if manifest.segmentation is not None else []
    tasks += ["depth-estimation"] if manifest.depth is not None else []
    lines = [
        f"license: {json.dumps(licence)}",
        f"pretty_name: {json.dumps(_flat(title))}",
        *(["task_categories:", *(f"- {task}" for task in tasks)] if tasks else []),
        "tags:",
        *(f"- {tag}" for tag in ("kdcache", "knowledge-distillation", "zarr")),
        f"viewer: {json.dumps(False)}",
    ]
    return "\n".join(["---", *lines, "---"])


def _licence(manifest: Manifest, licence: str) -> str:
    pixels = (
        "Images and labels are in it, under licences of their own."
        if manifest.view.pixels == "stored"
        else "Images and labels are not in it: they come from the data set, under its own licence."
    )
    return f"Licence of the stored outputs: `{licence}`. {pixels}"


def _train_from(manifest: Manifest, name: str, address: str | None, seal: str | None) -> str:
    """Return the commands that fetch, check and use a cache, as Markdown."""
    store = f"{name.removesuffix('.zarr')}.zarr"
    fetch = (
        ["pip install '.[hub]'   # once, in a clone of kdcache", f"kdcache copy {address} {store}"] if address else []
    )
    check = [f"kdcache verify {store} --seal {seal}"] if seal else []
    data = " --data DATA" if manifest.view.pixels == "source" else ""
    train = [f"kdcache train-student --cache {store}{data} --model kdcache:tiny --out runs/student"]
    words = (
        f"DATA is the data set {_line(manifest.dataset.name)}: training refuses images that render to other pixels "
        "than the teacher saw.\n\n"
        if data
        else ""
    )
    return words + _block("bash", "\n".join([*fetch, *check, *train]))


def _rebuild(manifest: Manifest) -> str:
    """Return the command that builds the cache, and what identifies its inputs, as Markdown."""
    teacher, build = manifest.teacher, manifest.build
    members = [
        (f"TEACHER_{number + 1}", f"{bare(member.spec)}, weights sha256:{member.weights}")
        for number, member in enumerate(teacher.members)
    ]
    facts = [
        ("DATA", f"{manifest.dataset.name}, split {manifest.dataset.split}, {manifest.dataset.samples} samples; "
                 f"digest of ids and classes {manifest.dataset.ids_digest}"),
        *(members or [("TEACHER", f"{bare(teacher.spec)}, weights sha256:{teacher.weights}")]),
        *((("CLASS_MAP", "the file that gave " + " ".join(map(str, teacher.class_map))),) if teacher.class_map else ()),
        ("seed of the views", "none is drawn" if manifest.view.drawn is None else str(manifest.view.drawn.seed)),
        ("versions", ", ".join([manifest.created_by, *(f"{name} {v}" for name, v in build.libraries.items())])),
        ("device", f"{build.device}, {build.threads} threads"),
        *((f"shards {repair.shards} taught again", repair.describe()) for repair in manifest.repairs),
    ]  # fmt: skip
    words = (
        "With equal versions, threads and hardware the array files come out byte for byte; the seal has the time, too."
    )
    return f"{_block('bash', build_command(manifest))}\n\n{_table(facts)}\n\n{words}"


def _retrain(run: Run, recipe: dict[str, object]) -> str:
    verb = recipe.get("verb", VERBS[-1])
    if run.recipe_text is None or verb not in VERBS:
        return f"The folder has no {RECIPE} of a training: its settings are not known."
    command = f"kdcache {verb} --recipe {RECIPE} --out RUN"
    machine = run.environment
    packages = {"python": machine.get("python"), **machine.get("packages", {})}
    facts = [
        ("versions", ", ".join(f"{name} {packages[name]}" for name in _VERSIONS if name in packages)),
        ("machine", f"{machine.get('gpu') or 'cpu'}, {machine.get('threads')} threads, {machine.get('platform')}"),
    ]
    facts = facts if machine else [("versions", f"not recorded: there is no {ENVIRONMENT}")]
    words = (
        f"{RECIPE} is this. It names places without the folders above them. Equal versions, threads and hardware give "
        "equal weights."
    )
    text = tomli_w.dumps(public_values(recipe)).strip()
    return f"{_block('bash', command)}\n\n{words}\n\n{_block('toml', text)}\n\n{_table(facts)}"


def _results(run: Run) -> str:
    """Return a table of the results at the end of a training, in Markdown."""
    return _table((name.replace("_", " "), _value(value)) for name, value in run.result.items() if _is_plain(value))


def _is_plain(value: object) -> bool:
    return value is not None and not isinstance(value, dict | list)


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _source(recipe: dict[str, object]) -> str:
    """Return the name of the data that a run learnt from. It is not the path, which is private."""
    named = source_of(recipe)
    if named is None:
        return "several streams" if recipe.get("stream") else "data that are not recorded"
    return " + ".join(map(_name, named.split(" + ")))


def _program(run: Run) -> str:
    return f"kdcache {run.environment.get('packages', {}).get('kdcache', 'of an unknown version')}"


def _bibtex(key: str, title: str, year: str, program: str, address: str | None, note: str) -> str:
    fields = [
        ("title", "{" + _tex(title) + "}"),
        *([("year", year)] if year else []),
        ("howpublished", _tex(program if address is None else f"{program}, {address}")),
        ("note", _tex(note)),
    ]
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields)
    return _block("bibtex", f"@misc{{{key},\n{lines}\n}}")


def _key(name: str, digest: str) -> str:
    return "-".join(filter(None, [re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "kdcache", digest[:8]]))


def _tex(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", _flat(text).replace("\\", "/"))


def _name(place: str) -> str:
    return Path(place.rstrip("/")).name.removesuffix(".zarr") or place


def _flat(text: str) -> str:
    """Return a text from elsewhere in one line, without terminal escape codes."""
    return " ".join(plain_text(text).split())


def _line(text: str) -> str:
    """Return a text from elsewhere as one line of Markdown, with markup escaped."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", _flat(text))


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {_line(name)} | {_line(value)} |" for name, value in rows)])


def _block(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
