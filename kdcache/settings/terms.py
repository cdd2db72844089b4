"""Settings of the loss terms: one class per kind. A module of the same kind in `kdcache.distill.terms` computes it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from kdcache.errors import RecipeError
from kdcache.settings.parse import Positive, Weight
from kdcache.settings.setting import setting
from kdcache.settings.term import TERMS, FeatureTerm, LossTerm, Name, Share, is_summary
from kdcache.tasks import AUXILIARY, DEPTH, METRES, SEGMENTATION


class _OnLabels(LossTerm):
    """A base class of loss terms that learn from labels only, without a teacher."""

    learns_from = "labels"


class OfLogits(LossTerm):
    """A base class of loss terms that compare the student's and the teacher's softmax(logits / `temperature`)."""

    temperature: Positive = setting(1.0, "Temperature of both softmaxes.")


class Projected(FeatureTerm):
    """A base class of loss terms that project the student's features to the teacher's channels.

    Projector `linear` is a trained 1x1 convolution. `mlp` is two of them with a GELU between. With `standardise` set
    to `channels`, the mean of each teacher channel is subtracted, and the rest divided by the standard deviation.
    """

    standardise: Literal["none", "channels"] = setting("none", "Standardise the teacher's channels.")
    projector: Literal["linear", "mlp"] = setting("linear", "How the student's features are projected.")


class PseudoLabels(LossTerm):
    """A base class of loss terms that learn from pseudo labels: the classes that a network predicts for pixels.

    A pixel is confident if the probability of its pseudo label is at least `threshold`. If `quantile` is set, the most
    probable pixels of each class in the batch are confident instead. `normalise` says how pixels add up to the loss:

    - `kept`: the sum over confident pixels, divided by the sum of their class weights.
    - `all`: the sum over confident pixels, divided by the number of counted pixels.
    - `share`: the mean over all counted pixels, confident or not, times the share of confident ones.
    """

    follows_paste = True

    threshold: Share = setting(0.7, "Least probability of a pseudo label.")
    quantile: Share | None = setting(
        None,
        "Instead of threshold: for each class, the share of its pixels in a batch that count, most probable first.",
    )
    normalise: Literal["kept", "all", "share"] = setting(
        "kept", "What the sum is divided by: kept (confident pixels), all (counted pixels), share (see the class)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        has_threshold = "threshold" in self.given or self.threshold != type(self).threshold
        if has_threshold and self.quantile is not None:
            raise RecipeError(
                f"Cannot choose pseudo labels of {self.kind} by threshold {self.threshold} and by quantile "
                f"{self.quantile}",
                fix="Leave one of them out.",
            )

    @property
    def whole_batch(self) -> bool:  # type: ignore[override]
        """True if a quantile is set. It is computed over the whole batch, so the batch cannot be divided."""
        return self.quantile is not None


class Depth(_OnLabels):
    """A base class of loss terms that compare the student's depth with labels or with the teacher's depth."""

    compares = head = DEPTH
    follows_mix = follows_paste = True

    reference: Literal["labels", "teacher"] = setting("labels", "What the student's depth is compared with.")

    @property
    def learns_from(self) -> str:  # type: ignore[override]
        """`labels` or `teacher`: the depth that the student's depth is compared with."""
        return self.reference

    @property
    def in_metres(self) -> bool:
        """Always True: depth is compared in metres."""
        return True

    def check_unit(self, whose: str, head: Any) -> None:
        """Check that a head predicts depth in metres.

        `head` has an attribute `unit`. `whose` names the head's owner in the error, such as "the student's".

        Raises: RecipeError for another unit.
        """
        if head.unit != METRES:
            raise RecipeError(
                f"{self.kind} needs depth in metres, but {whose} head {DEPTH} has unit {head.unit!r}",
                fix="Use depth-ssi, which compares depth up to a scale and a shift.",
            )


class CrossEntropy(_OnLabels):
    """Settings of the loss term `ce`: cross-entropy with the labels, at the label's size. Flags set it, not --term.

    An explicit `weight=None` means 1.
    """

    kind = "ce"
    fused = partly_labelled = follows_mix = follows_paste = True

    weight: Weight | None = setting(1.0, "Weight of ce, the cross-entropy.")
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = setting(
        0.0, "Share of each label that ce and auxiliary spread over all classes."
    )
    focal_gamma: Weight = setting(0.0, "Exponent of the focal loss in ce: 2 is usual, 0 off.")
    class_weights: Literal["none", "median", "sqrt"] = setting(
        "sqrt", "Class weights of ce and auxiliary: median frequency, its sqrt, or none."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.focal_gamma > 0 and self.label_smoothing > 0:
            raise RecipeError(
                f"Cannot combine --focal-gamma {self.focal_gamma:g} with --label-smoothing {self.label_smoothing:g}",
                fix="Leave one of them out.",
            )

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of the training's settings that affect the term: its weight and its other options."""
        return ("ce_weight", "label_smoothing", "focal_gamma", "class_weights")


class KL(OfLogits):
    """Settings of the loss term `kl`: KL divergence between the teacher's and the student's class probabilities.

    It is computed at the label's size. Flags set it, not --term.
    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "kl"
    fused = follows_mix = follows_paste = True

    weight: Weight | None = setting(0.3, "Weight of kl, which is temperature^2 * KL divergence.")
    temperature: Positive = setting(2.0, "Temperature of both softmaxes in kl.")

    @property
    def takes(self) -> tuple[str, ...]:
        """The training's settings that affect the term, by name: options, pixel weights, `distill_schedule`."""
        return ("kl_weight", "temperature", *super().takes)


class Pseudo(PseudoLabels):
    """Settings of the loss term `pseudo`: cross-entropy with the teacher's best class, where the teacher is confident.

    Class weights are in proportion to 1 / frequency (`median`) or its square root (`sqrt`), or all 1 (`none`).
    """

    kind = "pseudo"
    class_weights: Literal["none", "median", "sqrt"] = setting(
        "none", "Weights of classes by how rare they are among the targets."
    )


class Attention(FeatureTerm):
    """Settings of the loss term `at`: the difference between the attention maps of a student's and a teacher's tap."""

    kind = "at"
    stored = ("the attention map or features of {}", "--statistics at:{}")
    weight: Weight | None = setting(
        None, "Factor on the term (default: h * w / 2, for a teacher's tap of h x w cells)."
    )

    def offered(self, manifest: Any) -> list[str]:
        """Return the usable taps in the cache of `manifest`: first those with features, then with attention maps.

        The last one is the default.
        """
        return super().offered(manifest) + _made_of(manifest, "at")

    def arrays(self, manifest: Any) -> tuple[str, ...]:
        """Return the paths of the arrays to read: the teacher tap's attention map if stored, else its features."""
        mapped = self.teacher_tap in _made_of(manifest, "at")
        return (f"statistics/at.{self.teacher_tap}",) if mapped else super().arrays(manifest)


class Similarity(FeatureTerm):
    """Settings of the loss term `sp`: it compares which images of a batch are similar.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "sp"
    compares = "similarity"
    whole_batch = True
    weight: Weight | None = setting(50.0, "Factor on the term.")


class TokenSimilarity(FeatureTerm):
    """Settings of the loss term `similarity`: it compares which cells of an image have similar features."""

    kind = "similarity"
    compares = "similarity"
    whole_view = True
    stored = ("the token similarities or features of {}", "--statistics similarity:{}")
    temperature: Positive = setting(0.07, "Temperature of both softmaxes.")

    def offered(self, manifest: Any) -> list[str]:
        """Return the usable taps in the cache of `manifest`: first those with features, then with similarities.

        The last one is the default.
        """
        maps = [tap for tap in super().offered(manifest) if not is_summary(manifest.features[tap])]
        return maps + _made_of(manifest, "similarity")

    def arrays(self, manifest: Any) -> tuple[str, ...]:
        """Return the paths of the arrays to read from a cache: the tap's stored similarities, or else its features."""
        stored = self.teacher_tap in _made_of(manifest, self.kind)
        return (f"statistics/{self.kind}.{self.teacher_tap}",) if stored else super().arrays(manifest)


class Queue(FeatureTerm):
    """Settings of the loss term `queue`: it compares which recent images an image resembles, in student and teacher.

    The teacher's tap must have one vector per view. The vectors of the last `length` images are kept.
    """

    kind = "queue"
    compares = "similarity"
    whole_view = True
    stored = ("the summary {} of 1x1 cells", "--features {}")
    temperature: Positive = setting(0.07, "Temperature of both softmaxes.")
    length: Annotated[int, Ge(1)] = setting(1024, "Number of recent images whose vectors are kept.")

    def offered(self, manifest: Any) -> list[str]:
        """Return the cache's taps with one vector per view. `teacher_tap` is one of them, by default the last."""
        return [tap for tap in super().offered(manifest) if is_summary(manifest.features[tap])]


class Hint(Projected):
    """Settings of the loss term `hint`: the difference between the student's projected features and the teacher's."""

    kind = "hint"
    distance: Literal["mse", "smooth-l1"] = setting("mse", "How features are compared: squared error, or smooth L1.")


class Cosine(Projected):
    """Settings of the loss term `cosine`: 1 - cosine of student's and teacher's features.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "cosine"
    weight: Weight | None = setting(2.0, "Factor on the term.")


class Channels(FeatureTerm):
    """Settings of the loss term `cwd`: it compares where in an image each class, or channel of a tap, is strong."""

    kind = "cwd"
    all_classes = raw_logits = True
    weight: Weight | None = setting(None, "Factor on the term (default: 0.15 for logits, 3 for features of a tap).")
    temperature: Positive = setting(4.0, "Temperature of both softmaxes.")

    @property
    def compares(self) -> str:  # type: ignore[override]
        """The compared tensors: `features` if a tap of the student or the teacher is given, else `logits`."""
        return "logits" if self.student_tap is None and self.teacher_tap is None else "features"

    @property
    def default_weight(self) -> float:
        """The weight that is used if `weight` is None: 3 for features, 0.15 for logits."""
        return 3.0 if self.reads_taps else 0.15


class Relations(OfLogits):
    """Settings of the loss term `dist`: 1 - r, where r is the Pearson correlation of both models' class probabilities.

    `beta` weighs the mean over cells of 1 - r across a cell's classes. `gamma` weighs the mean over classes of 1 - r
    across the cells of the whole batch. The loss is the weighted sum of both means, times `temperature` squared.
    """

    kind = "dist"
    whole_batch = True
    beta: Weight = setting(1.0, "Weight of the relations between classes.")
    gamma: Weight = setting(1.0, "Weight of the relations between cells.")


class Decoupled(OfLogits):
    """Settings of the loss term `dkd`: it compares the models in the target class, and separately in the other classes.

    The target class is the label's class, or for void the teacher's best class.
    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "dkd"
    all_classes = True
    weight: Weight | None = setting(0.02, "Factor on the term.")
    temperature: Positive = setting(4.0, "Temperature of both softmaxes.")
    alpha: Weight = setting(1.0, "Weight of comparing the target class with all other classes together.")
    beta: Weight = setting(8.0, "Weight of comparing the other classes among each other.")


class Dice(_OnLabels):
    """Settings of the loss term `dice`: 1 - the Dice coefficient of predictions and labels."""

    kind = "dice"


class Lovasz(_OnLabels):
    """Settings of the loss term `lovasz`: the Lovasz extension of 1 - IoU of predictions and labels."""

    kind = "lovasz"


class Auxiliary(_OnLabels):
    """Settings of the loss term `auxiliary`: cross-entropy of the head of `MODEL+aux`.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "auxiliary"
    head = AUXILIARY
    partly_labelled = True
    weight: Weight | None = setting(0.1, "Factor on the term.")

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of the training's settings that affect the term: only `label_smoothing`, as for the term `ce`."""
        return ("label_smoothing",)


class Entropy(LossTerm):
    """Settings of the loss term `entropy`: the entropy of the student's predictions.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "entropy"
    learns_from = "predictions"
    weight: Weight | None = setting(0.001, "Factor on the term.")


class Consistency(PseudoLabels):
    """Settings of the loss term `consistency`: the strong view learns from confident predictions for the weak view.

    The strong view is the image with the colour jitter, the weak view is the same image without it. `by` says who
    predicts: the student, its moving average (`ema`), or the cache's teacher (`store`). A prediction is confident from
    `threshold` on, or by `quantile`. `normalise=all` divides the sum over confident pixels by the number of all counted
    pixels, `kept` by the number of confident pixels. `share` is the mean over all counted pixels, times the share of
    confident ones.
    """

    kind = "consistency"
    threshold: Share = setting(0.968, "Least probability of a pseudo label.")
    normalise: Literal["kept", "all", "share"] = setting(
        "all", "What the sum is divided by: kept (confident pixels), all (counted pixels), share (see the class)."
    )
    by: Literal["student", "ema", "store"] = setting("student", "Which model makes the pseudo labels.")

    @property
    def learns_from(self) -> str:  # type: ignore[override]
        """`teacher` if the pseudo labels come from the cache (`by=store`), else `predictions` of the student."""
        return "teacher" if self.by == "store" else "predictions"

    @property
    def labels_itself(self) -> bool:
        """True if the term is active and its pseudo labels come from the student or the student's EMA."""
        return self.by != "store" and self.active


class Adversarial(LossTerm):
    """Settings of the loss term `adversarial`: predictions on two streams should look alike to a discriminator."""

    kind = "adversarial"
    learns_from = "predictions"
    weight: Weight | None = setting(
        None, "Factor on the term (default: 0.001, or 0.01 for least-squares. For auxiliary a fifth of it)."
    )
    against: Name | None = setting(
        None, "The other stream, whose predictions this stream's should look like (default: the only other one)."
    )
    loss: Literal["vanilla", "least-squares"] = setting(
        "vanilla", "The discriminator's loss: cross-entropy (vanilla), or least squares."
    )
    head: Literal["segmentation", "auxiliary"] = setting(  # type: ignore[misc]
        "segmentation", "The student's head whose predictions are compared."
    )

    @property
    def default_weight(self) -> float:
        """The weight if `weight` is None: 0.01 for least-squares, else 0.001. For the auxiliary head, a fifth."""
        return (0.01 if self.loss == "least-squares" else 0.001) * (1 if self.head == SEGMENTATION else 0.2)


class DepthL1(Depth):
    """Settings of the loss term `depth-l1`: the absolute error of depth in metres.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "depth-l1"
    weight: Weight | None = setting(0.1, "Factor on the term.")


class DepthBerhu(Depth):
    """Settings of the loss term `depth-berhu`: the reverse Huber loss of depth in metres.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "depth-berhu"
    weight: Weight | None = setting(0.04, "Factor on the term.")


class DepthSilog(Depth):
    """Settings of the loss term `depth-silog`: the scale-invariant error of log depth.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "depth-silog"
    weight: Weight | None = setting(0.1, "Factor on the term.")


class DepthSsi(Depth):
    """Settings of the loss term `depth-ssi`: the error of depth up to scale and shift.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "depth-ssi"
    weight: Weight | None = setting(0.3, "Factor on the term.")
    reference: Literal["labels", "teacher"] = setting("teacher", "What the student's depth is compared with.")
    alpha: Weight = setting(0.5, "Weight of the second part, which compares gradients of depth.")

    @property
    def in_metres(self) -> bool:
        """True if the student's depth is compared with labels, in metres. False if with the teacher's depth."""
        return self.reads_labels

    def check_unit(self, whose: str, head: Any) -> None:
        """Do nothing: the term compares depth of any unit."""


class DepthGradient(Depth):
    """Settings of the loss term `depth-gradient`, which compares changes of log depth.

    An explicit `weight=None` means 1, not the default of the field.
    """

    kind = "depth-gradient"
    weight: Weight | None = setting(0.5, "Factor on the term.")


KINDS = tuple(kind for kind, term in TERMS.items() if not term.fused)  # of `--term`
ON_LABELS = tuple(kind for kind in KINDS if TERMS[kind]().reads_labels)  # which need no teacher
METHODS = ("kl", *KINDS)  # of `--method`


def _made_of(manifest: Any, kind: str) -> list[str]:
    """Return the taps in a cache that have a stored statistic of a kind."""
    statistics: Mapping[str, Any] = getattr(manifest, "statistics", {})
    return [name.removeprefix(f"{kind}.") for name in statistics if name.startswith(f"{kind}.")]
