"""Whether samples of one stream can be pasted into those of another, with labels and targets."""

from collections.abc import Sequence

from kdcache.distill.terms.needs import depth_head
from kdcache.distill.terms.spec import of_depth, reads_teacher
from kdcache.errors import RecipeError
from kdcache.heads import DEPTH, METRES, SEGMENTATION
from kdcache.training.sources.source import Source


def check_pasting(sources: Sequence[Source]) -> None:
    """Check every stream that is pasted into. Raises: RecipeError with the name of the stream."""
    for source in sources:
        if source.pasted is not None:
            with source.named():
                _check_labels(source, source.pasted)
                _check_forms(source, source.pasted)


def _check_labels(source: Source, pasted: Source) -> None:
    dataset = pasted.dataset
    classes = SEGMENTATION in dataset.tasks and bool(dataset.own_classes.names)
    if not dataset.labelled or not classes:
        raise RecipeError(
            "what is pasted is taught by its labels of classes",
            received=f"paste-from {pasted.stream.name}, "
            + ("whose labels are of depth alone" if dataset.labelled else "of which no sample has a label that is used")
            + f" (labels={pasted.config.labels})",
            remedy="paste from a stream with labels of classes; of two streams, labels go into the one without",
        )


def _check_forms(source: Source, pasted: Source) -> None:
    """Check that a target and what is pasted into it mean the same. Raises: RecipeError."""
    cache, other = source.cache, pasted.cache
    depth = any(of_depth(term) and reads_teacher(term) and term.weight != 0 for term in source.config.terms)
    differs = []
    unit = depth_head(cache.manifest).unit if depth and cache is not None else METRES
    if unit != METRES:
        differs.append(f"depth in unit {unit!r}, known up to a scale of each image")
    if cache is not None and other is not None:
        shared = set(source.dataset.heads) & set(pasted.dataset.heads)
        if SEGMENTATION in shared and cache.align_corners != other.align_corners:
            differs.append(f"logits resized with align_corners={other.align_corners} into {cache.align_corners}")
        if depth and DEPTH in shared and depth_head(cache.manifest) != depth_head(other.manifest):
            differs.append(f"depth as {depth_head(other.manifest)} into {depth_head(cache.manifest)}")
    if differs:
        raise RecipeError(
            "targets that are pasted into others mean the same as these",
            received=f"paste-from {pasted.stream.name}: {'; '.join(differs)}",
            remedy="leave the terms that read them out of one stream; or give stores of one teacher",
        )
