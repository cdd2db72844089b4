"""Values that are written as text: their types, each with its parser."""

import re
from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt, Predicate

from kdcache.errors import RecipeError, suggest
from kdcache.settings.setting import Spelling
from kdcache.tasks import TASKS

LOGGERS = ("tensorboard", "wandb")
"""Services for metrics. Each is also the name of a package and of the pip extra that installs it."""

Positive = Annotated[float, Gt(0), Predicate(isfinite)]
Weight = Annotated[float, Ge(0), Predicate(isfinite)]
Count = Annotated[int, Ge(1)]


def parse_size(text: str) -> tuple[int, int]:
    """Return the (height, width) of a text: '144x192' becomes (144, 192). Raises: ValueError for other text."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError
    return int(parts[0]), int(parts[1])


def parse_range(text: str) -> tuple[float, float]:
    """Return the two numbers of a text: '0.5:2' becomes (0.5, 2.0). Raises: ValueError for other text."""
    low, high = map(float, text.split(":"))
    return low, high


def parse_every(value: Any) -> Any:
    """Return a number of steps: '500' or 500 becomes 500. A number of epochs such as '5e' is returned as text.

    Raises: ValueError for any other value.
    """
    if isinstance(value, bool) or not re.fullmatch(r"[1-9][0-9]*e?", str(value)):
        raise ValueError
    text = str(value)
    return text if text.endswith("e") else int(text)


def parse_bytes(text: str) -> int:
    """Return the number of bytes of a text such as '50GiB' or '200MB'. Raises: ValueError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)", text.strip().lower())
    count = 0
    if match is not None:
        number, unit, binary = match.groups()
        count = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))
    if count < 1:
        raise ValueError(text)
    return count


def parse_words(text: str) -> tuple[str, ...]:
    """Return the words of a text without repetitions: 'a,b' becomes ('a', 'b'), and '' becomes ()."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Return the numbers of a text: '2,1' becomes (2.0, 1.0). Raises: ValueError for other text."""
    return tuple(map(float, text.split(",")))


def parse_colour(text: str) -> tuple[float, float, float]:
    """Return the three numbers of a text such as '0.485,0.456,0.406'. Raises: ValueError for other text."""
    red, green, blue = map(float, text.split(","))
    return red, green, blue


def parse_top_k(text: str) -> int | None:
    """Return a number of classes: '8' becomes 8, and 'auto' becomes None. Raises: ValueError for other text."""
    if text != "auto" and not text.isdigit():
        raise ValueError
    return None if text == "auto" else int(text)


def parse_views(text: str) -> int:
    """Return a number of views per sample: '4' becomes 4, and 'full' becomes 1. Raises: ValueError for other text."""
    if text != "full" and not (text.isdecimal() and int(text)):
        raise ValueError
    return 1 if text == "full" else int(text)


def parse_logs(value: Any) -> Any:
    """Return the names of loggers without repetitions: 'wandb,tensorboard' becomes ('wandb', 'tensorboard').

    A list of such texts is also accepted. Any other value is returned unchanged.

    Raises: RecipeError, with the nearest name, for an unknown logger.
    """
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        return value
    loggers = [name.strip() for part in parts for name in part.split(",")]
    for name in loggers:
        if name not in LOGGERS:
            others = f"Use one or more of {', '.join(LOGGERS)}, or leave it out: metrics.jsonl has all metrics."
            raise RecipeError(f"Unknown logger {name!r} in --log", fix=suggest(name, LOGGERS, others))
    return tuple(dict.fromkeys(loggers))


def parse_lr_scales(value: Any) -> Any:
    """Check one text such as 'encoder=0.1', or a list of such texts, and return a tuple of the texts.

    Any other value is returned unchanged. Raises: ValueError if a text is not PREFIX=FACTOR (see `lr_scales`).
    """
    return _each(value, lr_scales)


def lr_scales(texts: tuple[str, ...]) -> dict[str, float]:
    """Return factors on the learning rate by prefix of parameter names: ('encoder=0.1',) becomes {'encoder': 0.1}.

    Raises: ValueError if a text is not PREFIX=FACTOR, if a prefix is repeated, or if a factor is not above 0.
    """
    scales = {prefix: float(factor) for prefix, _, factor in (text.partition("=") for text in texts)}
    if len(scales) < len(texts) or not all(prefix and 0 < factor < inf for prefix, factor in scales.items()):
        raise ValueError
    return scales


def parse_task_weights(value: Any) -> Any:
    """Check one text such as 'depth=0.7', or a list of such texts, and return a tuple of the texts.

    Any other value is returned unchanged. Raises: ValueError if a text is not TASK=WEIGHT (see `task_weights`).
    """
    return _each(value, task_weights)


def task_weights(texts: tuple[str, ...]) -> dict[str, float]:
    """Return weights of tasks: ('depth=0.7',) becomes {'depth': 0.7}.

    Raises: ValueError if a text is not TASK=WEIGHT, if a task is unknown or repeated, or if a weight is below 0.
    """
    weights = {task.strip(): float(weight) for task, _, weight in (text.partition("=") for text in texts)}
    if len(weights) < len(texts) or set(weights) - set(TASKS) or not all(0 <= x < inf for x in weights.values()):
        raise ValueError
    return weights


def _each(value: Any, read: Callable[[tuple[str, ...]], object]) -> Any:
    """Check a text, or a list of texts, with `read`. Return a tuple of them, or any other value unchanged."""
    parts = (value,) if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
        read(tuple(parts))
        return tuple(parts)
    return value


def parse_caches(value: Any) -> Any:
    """Return the paths of caches as a tuple of texts: 'a.zarr' becomes ('a.zarr',). An empty list becomes None.

    A path or a list of paths is accepted. Any other value is returned unchanged.
    """
    parts = (value,) if isinstance(value, str | Path) else value
    return (tuple(map(str, parts)) or None) if isinstance(parts, list | tuple) else value


def parse_tasks(value: Any) -> Any:
    """Check 'all', 'none' or tasks such as 'segmentation+depth', and return the text.

    A list of tasks is joined with '+'.

    Raises: ValueError for unknown or repeated tasks.
    """
    words = value.split("+") if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        raise ValueError
    words = [str(word).strip() for word in words]
    if words not in (["all"], ["none"]) and (not words or set(words) - set(TASKS) or len(set(words)) < len(words)):
        raise ValueError
    return "+".join(words)


def parse_jitter(value: Any) -> Any:
    """Return the strength of colour jitter: '0.3' or 0.3 becomes 0.3. A text 'randaugment:N,M' is returned unchanged.

    Raises: ValueError for any other value, and for numbers outside 0 to 1.
    """
    if isinstance(value, str) and rand_augment(value) is not None:
        return value
    if isinstance(value, bool) or not 0 <= (strength := float(value)) <= 1:
        raise ValueError
    return strength


def rand_augment(text: str) -> tuple[int, int] | None:
    """Return the settings of RandAugment: 'randaugment:2,9' becomes (2, 9), which means 2 operations of magnitude 9.

    Return None for other text, and for numbers outside 1 to 16 operations and magnitudes 0 to 30.
    """
    match = re.fullmatch(r"randaugment:([1-9]|1[0-6]),([12]?[0-9]|30)", text.replace(" ", ""))
    return None if match is None else (int(match[1]), int(match[2]))


RARE_TEMPERATURE = 0.01
"""The temperature of `rare` sampling without a number, as in DAFormer (Hoyer et al. 2022, arXiv 2111.14887)."""


def parse_sampling(text: str) -> str:
    """Check 'even', 'rare' or 'rare:T', with a temperature T above 0, and return the text. Raises: ValueError."""
    kind, colon, temperature = text.partition(":")
    if text != "even" and (kind != "rare" or (colon and not 0 < float(temperature) < inf)):
        raise ValueError
    return text


def rare_temperature(sampling: str) -> float | None:
    """Return the temperature of rare-class sampling: 'rare:0.1' gives 0.1, 'rare' gives 0.01, and 'even' gives None."""
    kind, _, temperature = sampling.partition(":")
    return None if kind == "even" else float(temperature or RARE_TEMPERATURE)


def parse_schedule(text: str) -> str:
    """Return the text if it is a schedule of the teacher's weight: 'constant', 'fade' or 'warmup:500' (500 steps).

    Raises: ValueError for other text.
    """
    if text not in ("constant", "fade") and not warmup_steps(text):
        raise ValueError
    return text


def warmup_steps(text: str) -> int:
    """Return the number of steps of a schedule: 'warmup:500' gives 500. Any other text gives 0."""
    kind, _, steps = text.partition(":")
    return int(steps) if kind == "warmup" and steps.isdecimal() else 0


Size = Annotated[
    tuple[Count, Count],
    Spelling(
        parse_size,
        show=lambda size: f"{size[0]}x{size[1]}",
        rule="HEIGHTxWIDTH in pixels, two whole numbers from 1",
        example="288x384",
    ),
]
Range = Annotated[
    tuple[Positive, Positive],
    Spelling(
        parse_range, show=lambda ends: f"{ends[0]}:{ends[1]}", rule="MIN:MAX, two numbers above 0", example="0.5:2.0"
    ),
]
Every = Annotated[
    int | str,
    Spelling(
        parse_every, text_only=False, rule="a number of iterations such as 500, or of epochs such as 5e", example="500"
    ),
]
Bytes = Annotated[
    int, Ge(1), Spelling(parse_bytes, rule="a size from 1 byte on, such as 50GiB or 200MB", example="50GiB")
]
Logs = Annotated[tuple[str, ...], Spelling(parse_logs, text_only=False, rule=None, example="tensorboard")]
LrScales = Annotated[
    tuple[str, ...],
    Spelling(
        parse_lr_scales,
        text_only=False,
        rule="PREFIX=X, a prefix of parameter names, each given once, and a factor above 0",
        example="encoder=0.1",
    ),
]
Caches = Annotated[
    tuple[str, ...],
    Spelling(
        parse_caches,
        show=lambda caches: caches[0] if len(caches) == 1 else list(caches),
        rule="a cache, or a list of them, the further ones as NAME=CACHE",
        example="camvid.zarr",
        text_only=False,
    ),
]
Words = Annotated[tuple[str, ...], Spelling(parse_words, show=",".join, rule=None, example="")]
Numbers = Annotated[
    tuple[float, ...], Spelling(parse_numbers, rule="one number per teacher, with commas between", example="2,1")
]
Colour = Annotated[
    tuple[float, float, float], Spelling(parse_colour, rule="three numbers for R,G,B in 0..1", example="0.5,0.5,0.5")
]
Sampling = Annotated[
    str, Spelling(parse_sampling, rule="even, rare or rare:T, with a temperature above 0", example="rare:0.01")
]
DistillSchedule = Annotated[
    str, Spelling(parse_schedule, rule="constant, fade or warmup:N, a number of iterations", example="warmup:500")
]
Jitter = Annotated[
    float | str,
    Spelling(
        parse_jitter,
        text_only=False,
        rule="a strength from 0 to 1, or randaugment:N,M, with 1 to 16 operations and a magnitude of 0 to 30",
        example="randaugment:2,9",
    ),
]
Tasks = Annotated[
    str, Spelling(parse_tasks, text_only=False, rule="all, none, or tasks such as segmentation+depth", example="none")
]
TaskWeights = Annotated[
    tuple[str, ...],
    Spelling(
        parse_task_weights,
        text_only=False,
        rule=f"TASK=X, one of {', '.join(TASKS)}, each given once, and a weight of at least 0",
        example="depth=0.7",
    ),
]
Decay = Annotated[float, Gt(0), Lt(1), Spelling(float, rule="a decay above 0 and below 1", example="0.999")]
TopK = Annotated[int, Spelling(parse_top_k, rule="auto or a number of classes", example="auto", nothing="auto")]
Views = Annotated[
    int,
    Spelling(
        parse_views,
        show=str,
        rule="a number of views per sample, from 1, or full for the whole image, which is no crop",
        example="4",
    ),
]
Zoom = Annotated[
    tuple[float, float],
    Spelling(
        parse_range,
        show=lambda ends: f"{ends[0]:g}:{ends[1]:g}",
        rule="LOW:HIGH, 1 for the whole image at --size",
        example="1:2",
    ),
]


def count_of(flag: str, limit: float | None, available: int) -> int:
    """Return how many of the available samples a limit takes: a number, a share below 1, or None for all.

    Raises: RecipeError with the flag's name for none of them, or for more than there are.
    """
    if limit is None:
        return available
    count = round(limit * available) if limit < 1 else int(limit)
    if not 1 <= count <= available:
        raise RecipeError(
            f"Cannot use {flag} {limit:g} of {available} samples",
            fix=f"Give a number of samples from 1 to {available}, or a share between 0 and 1.",
        )
    return count


def all_listed(path: Path, samples: int) -> RecipeError:
    """Return the error for a list that names all samples of a cache, so that every distilled image has its label."""
    return RecipeError(
        f"No image is left to distil without its label: --labels-from {path} lists all {samples}",
        fix="Leave --labels-from out, list fewer ids, or build the cache of more images.",
    )
