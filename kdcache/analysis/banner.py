"""The line above every table, picture and page whose figures could be taken for a result and are none."""

from kdcache.data.joined import parts_of, task_of
from kdcache.data.scenes.generate import is_scenes


def banner(data: str, smoke: bool = False) -> str | None:
    """The note on figures of the procedural scenes, and of runs of `sweep --smoke`; None for all others.

    Args:
        data: the data set as a user names it.
        smoke: the runs are those of a recipe made small.
    """
    drawn = any(is_scenes(task_of(part)[1]) for part in parts_of(data))
    if not drawn and not smoke:
        return None
    what = "Smoke run" if smoke else "Procedural scenes"
    what += " on procedural scenes" if drawn and smoke else ""
    pictures = ", no photographs" if drawn else ", a few hundred steps at most"
    return f"{what}{pictures}: it shows that everything works, and nothing about any data set, model or method."
