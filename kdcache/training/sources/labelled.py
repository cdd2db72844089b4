"""Whether the data have the labels that a training learns from."""

from collections.abc import Sequence

from kdcache.distill.terms.spec import needs_labels, of_depth
from kdcache.errors import RecipeError
from kdcache.heads import DEPTH, SEGMENTATION
from kdcache.training.config import TrainConfig
from kdcache.training.input.dataset import DrawnDataset


def check_labels(config: TrainConfig, dataset: DrawnDataset) -> None:
    """Refuse terms on labels that nothing is labelled for. Raises: RecipeError."""
    terms = [term.kind for term in config.terms if needs_labels(term)]
    if terms and not dataset.labelled:
        raise RecipeError(
            "terms on labels take labelled samples",
            received=f"{', '.join(terms)}, and no sample with a label that is used (--labels {config.labels})",
            remedy="leave them out, or give labels",
        )


def check_tasks(config: TrainConfig, offered: Sequence[str]) -> None:
    """Refuse terms on labels of a task that is none of `offered`, which the source labels. Raises: RecipeError."""
    named = () if config.labels in ("all", "none") else config.labels.split("+")
    terms = [term for term in config.terms if needs_labels(term)]
    for task in (SEGMENTATION, DEPTH):
        kinds = [term.kind for term in terms if of_depth(term) == (task == DEPTH)]
        if task in offered or not (kinds or task in named):
            continue
        asked = [f"--labels {config.labels}"] if task in named else []
        example = ", for instance --data scenes:96x128,depth=exact" if task == DEPTH else ""
        raise RecipeError(
            f"terms of {task} on labels take a data set with labels of {task}, or a store that was built from one",
            entry="terms on labels need labels",
            received=f"{', '.join([*asked, *kinds])} for data with labels of {', '.join(offered) or 'no task'}",
            remedy=f"give such a data set as the source{example}; or leave {task} out",
        )
