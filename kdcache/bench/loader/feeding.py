"""The cost of a training step that a loader feeds, against the same step on one batch that lies in memory.

Waiting for a batch is only a part of that: a loader that draws ahead takes cores from the step. The steps are those of
`train-student`: forward, loss, backward, optimizer, by one student that all contestants train in turn.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from kdcache.bench.loader.report import MEMORY
from kdcache.bench.loader.streams import Stream, reference_batch
from kdcache.bench.loader.turns import Contestant
from kdcache.distill import Batch, DistillLoss
from kdcache.models import build_model
from kdcache.store import Cache
from kdcache.training.config import make_config
from kdcache.training.input.device_prefetch import feed
from kdcache.training.input.loader import Draws, next_batch
from kdcache.training.step.compiled import choose_step, make_step
from kdcache.training.step.eager import EagerStep, Step
from kdcache.training.step.optim import make_optimizer

FED_BY = ("ring", "inline", "resident", "default")
"""Loaders of LOADERS that feed steps."""
_SEED = 0


def make_student_step(
    cache: Cache, student: str, device: torch.device
) -> Callable[[Batch, Callable[[str], None]], Step]:
    """Build a student; what is returned makes its step from a first batch.

    Raises: ModelError for a student that is not known.
    """
    config = make_config(verb="train-student", model=student, cache=str(cache.path), method="kl", iterations=1)
    torch.manual_seed(_SEED)
    model = build_model(student, cache.num_classes).to(device).train().to(memory_format=torch.channels_last)
    kind = choose_step(config.step, device)
    criterion = DistillLoss(
        cache,
        ce_weight=config.ce_weight,
        kl_weight=config.kl_weight,
        temperature=config.temperature,
        align_corners=model.align_corners,
        impl=config.impl,
    ).to(device)
    optimizer = make_optimizer(model, config, capturable=kind == "graphed")
    eager = EagerStep(model, criterion, optimizer, device=device, bf16=device.type == "cuda")
    return lambda batch, note: make_step(kind, eager, batch, note)


def step_contestants(
    step: Step, draws: Draws, streams: Sequence[Stream], *, batch_size: int, steps: int, device: torch.device
) -> list[Contestant]:
    """The step on a batch from memory, then fed by each stream.

    Args:
        steps: steps of a turn.
    """
    batch = reference_batch(draws, 0, batch_size)
    if device.type == "cuda":
        batch = batch.pin_memory()
    memory = feed(repeat(batch), device)

    def contestant(name: str, title: str, take: Callable[[], Batch], warm_up: int) -> Contestant:
        def learn(count: int) -> None:
            losses: Tensor | None = None
            for _ in range(count):
                losses = step(take())
            if losses is not None:
                losses.tolist()  # waits for a GPU

        return Contestant(name, title, partial(learn, steps), steps, before=partial(learn, warm_up))

    fed = [contestant(one.name, f"fed by {one.title}", one.take, one.ahead + 1) for one in streams]
    return [contestant(MEMORY, "one batch from memory", lambda: next_batch(memory), 1), *fed]
