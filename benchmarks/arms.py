"""The contestants of `effect.py`: teachers, stores of their targets, and ways to train a student from them.

Words in braces are filled in by the queue: {data} is the data set, {part} the four fifths of its train split that
trainings see as a data set of their own, {large} the pixels of some teachers; names of teachers are their folders.
"""

from dataclasses import dataclass

HELD_OUT = "0/5"
JUDGED = f"--val-split train --val-fold {HELD_OUT}"
TEACHER = "--model kdcache:base --batch-size 8 --lr 2e-3 --warmup 100 --class-weights sqrt"
# "base" sees what students see; "sharp" crops at twice to four times the resolution, for pixels of --large; each "half"
# has seen a half of the four fifths, as often, and is judged on the other.
TEACHERS = {
    "base-0": f"--data {{data}} --seed 0 --iterations {{t}} --fold {HELD_OUT} {JUDGED}",
    "sharp-0": f"--data {{data}} --seed 0 --iterations {{longer}} --scale 1:4 --fold {HELD_OUT} {JUDGED}",
    "half-0": "--data {part} --seed 0 --iterations {shorter} --fold 0/2 --val-split train --val-fold 0/2",
    "half-1": "--data {part} --seed 0 --iterations {shorter} --fold 1/2 --val-split train --val-fold 1/2",
}
STUDENT = "--model kdcache:tiny --batch-size 8 --warmup 100 --class-weights sqrt --gradients-every 0"


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        store: whose pixels and targets; "" trains from the data folder.
        flags: beside those of all students.
        seeds: of the search.
    """

    name: str
    store: str
    flags: str
    seeds: int = 1

    @property
    def fold(self) -> str:
        """The flag that leaves the held-out fifth out: a store of {part} has never had it."""
        return "" if self.store == "crossed" else f"--fold {HELD_OUT}"

    @property
    def plain(self) -> bool:
        return self.store == "" or ("--method none" in self.flags and "--term" not in self.flags)


STORES = {
    "one": "--data {data} --views full --teacher {base-0}",
    "large": "--data {data} --views full --teacher {sharp-0} --teacher-size {large} --teacher-grid view --raw-logits "
    "--features head",
    "ensemble": "--data {data} --views full --teacher {sharp-0} --teacher {base-0} --tta flip --teacher-size {large} "
    "--teacher-grid view",
    "views": "--data {data} --teacher {sharp-0} --teacher-size {large} --teacher-grid view --views 16 --view-scale 1:2",
    "views of one": "--data {data} --teacher {base-0} --views 16 --view-scale 1:2",
    "views of two": "--data {data} --teacher {sharp-0} --teacher {base-0} --tta flip --teacher-size {large} "
    "--teacher-grid view --views 16 --view-scale 1:2",
    "crossed": "--data {part} --views 4 --folds 2 --teacher {half-0} --teacher {half-1}",
}
SOURCE = " with pixels from the files"
"""After the name of a store: its copy without pixels. Zooms are then as sharp as those of plain from files."""

# In the order in which they are run: what is most likely to matter first.
ARMS = (
    # Plain: about as many trials of the learning rate as the recipe gets of its weights.
    Arm("plain lr 0.004", "one", "--method none --lr 4e-3", 2),
    *(Arm(f"plain lr {lr:g}", "one", f"--method none --lr {lr:g}") for lr in (1e-3, 2e-3, 6e-3, 8e-3)),
    *(Arm(f"plain from files, lr {lr:g}", "", f"--lr {lr:g}") for lr in (2e-3, 3e-3, 4e-3, 6e-3, 8e-3)),
    Arm("kl w 0.3 T 2", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --temperature 2"),
    Arm("kl from an ensemble, balanced", "ensemble", "--method kl --lr 4e-3 --kl-weight 0.3 --class-balance sqrt"),
    Arm("kl from an ensemble", "ensemble", "--method kl --lr 4e-3 --kl-weight 0.3"),
    Arm("kl from an ensemble, fading", "ensemble", "--method kl --lr 4e-3 --kl-weight 1 --distill-schedule fade"),
    Arm("kl balanced", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --class-balance sqrt"),
    Arm("dist", "ensemble", "--method dist --lr 4e-3"),
    Arm("cwd", "large", "--method cwd --lr 4e-3"),
    Arm("dist w 3", "ensemble", "--method none --term dist,weight=3 --lr 4e-3"),
    Arm("dist w 3, lr 0.006", "ensemble", "--method none --term dist,weight=3 --lr 6e-3"),
    Arm("dist, lr 0.006", "ensemble", "--method dist --lr 6e-3"),
    Arm("dist w 3, lr 0.006, pixels from files", "ensemble" + SOURCE,
        "--method none --term dist,weight=3 --lr 6e-3 --data {data}"),
    Arm("kl balanced, lr 0.006, pixels from files", "ensemble" + SOURCE,
        "--method kl --kl-weight 0.3 --class-balance sqrt --lr 6e-3 --data {data}"),
    Arm("dist w 1, lr 0.006, pixels from files", "ensemble" + SOURCE, "--method dist --lr 6e-3 --data {data}"),
    Arm("dist, one teacher", "one", "--method dist --lr 4e-3"),
    Arm("kl w 1 T 2", "one", "--method kl --lr 4e-3 --kl-weight 1 --temperature 2"),
    Arm("dist and cwd", "large", "--method dist+cwd --lr 4e-3"),
    Arm("kl w 0.1 T 2", "one", "--method kl --lr 4e-3 --kl-weight 0.1 --temperature 2"),
    Arm("kl gate correct", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --gate correct"),
    Arm("kl trusted", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --class-trust auto --trust-against {plain}"),
    Arm("kl from a larger rendering", "large", "--method kl --lr 4e-3 --kl-weight 0.3"),
    Arm("at", "large", "--method at --lr 4e-3 --flip"),
    Arm("sp", "large", "--method sp --lr 4e-3 --flip"),
    Arm("plain, a quarter of the labels", "one", "--method none --lr 4e-3 --limit-samples 0.25"),
    Arm("kl on all, a quarter of the labels", "ensemble", "--method kl --lr 4e-3 --kl-weight 0.3 --limit-labels 0.25"),
    Arm("kl on all, a quarter of the labels, drawn alike", "ensemble",
        "--method kl --lr 4e-3 --kl-weight 0.3 --limit-labels 0.25 --labelled-share 0.25"),
    Arm("plain, 16 views", "views", "--method none --augment replay --lr 4e-3"),
    Arm("kl, 16 views", "views", "--method kl --augment replay --lr 4e-3 --kl-weight 0.3"),
    Arm("plain lr 0.006, 16 views", "views", "--method none --augment replay --lr 6e-3"),
    Arm("dist w 3, lr 0.006, 16 views", "views", "--method none --term dist,weight=3 --augment replay --lr 6e-3"),
    Arm("dist w 3, lr 0.006, 16 views of two", "views of two",
        "--method none --term dist,weight=3 --augment replay --lr 6e-3"),
    Arm("plain lr 0.008, 16 views", "views", "--method none --augment replay --lr 8e-3"),
    Arm("dist w 3, lr 0.008, 16 views", "views", "--method none --term dist,weight=3 --augment replay --lr 8e-3"),
    Arm("plain, 16 views, a quarter of the labels", "views",
        "--method none --augment replay --lr 6e-3 --limit-samples 0.25"),
    Arm("dist w 3, 16 views, a quarter of the labels", "views",
        "--method none --term dist,weight=3 --augment replay --lr 6e-3 --limit-labels 0.25"),
    Arm("dist w 3, 16 views, a quarter of the labels, drawn alike", "views",
        "--method none --term dist,weight=3 --augment replay --lr 6e-3 --limit-labels 0.25 --labelled-share 0.25"),
    # Views zoom in and never out: labels and warp are given the same.
    Arm("plain from files, lr 0.006, scale 1:2", "", "--lr 6e-3 --scale 1:2"),
    Arm("dist w 3, lr 0.006, pixels from files, scale 1:2", "ensemble" + SOURCE,
        "--method none --term dist,weight=3 --lr 6e-3 --scale 1:2 --data {data}"),
    Arm("plain lr 0.006, 4 views", "views of one", "--method none --augment replay --lr 6e-3 --limit-views 4"),
    Arm("dist, lr 0.006, 4 views of one", "views of one", "--method dist --augment replay --lr 6e-3 --limit-views 4"),
    Arm("dist, lr 0.006, 16 views of one", "views of one", "--method dist --augment replay --lr 6e-3"),
    Arm("dist w 3, lr 0.006, scale 1:2", "ensemble", "--method none --term dist,weight=3 --lr 6e-3 --scale 1:2"),
    Arm("dist w 3, 16 views of two, a quarter of the labels", "views of two",
        "--method none --term dist,weight=3 --augment replay --lr 6e-3 --limit-labels 0.25"),
    Arm("dist, lr 0.006, 16 views of two", "views of two", "--method dist --augment replay --lr 6e-3"),
    Arm("kl balanced, lr 0.006, 16 views of two", "views of two",
        "--method kl --kl-weight 0.3 --class-balance sqrt --augment replay --lr 6e-3"),
    *(Arm(f"dist w 3, lr 0.006, {views} views of two", "views of two",
          f"--method none --term dist,weight=3 --augment replay --lr 6e-3 --limit-views {views}")
      for views in (2, 4, 8)),
    Arm("kl w 0.3 T 1", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --temperature 1"),
    Arm("kl w 0.3 T 4", "one", "--method kl --lr 4e-3 --kl-weight 0.3 --temperature 4"),
    Arm("kl from a larger rendering, balanced", "large",
        "--method kl --lr 4e-3 --kl-weight 0.3 --class-balance sqrt"),
    Arm("kl from an ensemble, w 1", "ensemble", "--method kl --lr 4e-3 --kl-weight 1"),
    Arm("plain, cutmix", "one", "--method none --lr 4e-3 --mix cutmix:0.5"),
    Arm("dist, lr 0.006, one teacher", "one", "--method dist --lr 6e-3"),
    Arm("dist, lr 0.006, 4 views, cross-fitted", "crossed", "--method dist --augment replay --lr 6e-3"),
    Arm("kl, lr 0.006, 4 views, cross-fitted", "crossed", "--method kl --augment replay --lr 6e-3 --kl-weight 0.3"),
    # What all arms have in common.
    *(Arm(f"{name}, lr 0.006, 4 views of one, {what}", "views of one",
          f"--method {name} --augment replay --lr 6e-3 --limit-views 4 {flags}")
      for what, flags in (("classes unweighted", "--class-weights none"), ("no warmup", "--warmup 0"))
      for name in ("none", "dist")),
    # A student with the capacity of its teacher.
    *(Arm(f"{name}, 4 views, a student like its teacher", "views of one",
          f"--model kdcache:base --method {name} --augment replay --lr 2e-3 --limit-views 4")
      for name in ("none", "dist")),
    Arm("kl, cutmix", "ensemble", "--method kl --lr 4e-3 --kl-weight 0.3 --mix cutmix:0.5"),
)  # fmt: skip
