"""Several processes train as one would, and end together.

Most tests run the command line in forked children that find each other as torchrun's would; some start torchrun.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fork_server import ForkServer
from PIL import Image
from safetensors.torch import load_file

from kdcache.data import open_split, write_scenes
from kdcache.distill import Batch, DistillLoss, Streams, mean_counts
from kdcache.errors import RecipeError
from kdcache.models import build_model
from kdcache.store import open_cache
from kdcache.teacher import load_teacher
from kdcache.training import pick_device, read_config
from kdcache.training.distributed import World
from kdcache.training.step.compiled import choose_step
from kdcache.training.step.eager import row
from tests.training.test_tokens import Backbone

Read = Callable[..., list[dict[str, Any]]]
LOSS, NORM, WEIGHT = 1e-5, 1e-3, 1e-3
"""Of two processes beside one, in float32 over 6 to 24 steps: losses and gradient norms, relative; weights and running
statistics, the norm of the difference over that of what training moved."""
LONG = 24
LIMIT_S = 250
"""Seconds after which processes have hung: they take tens of seconds, and compile kernels on the first day."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "COLUMNS": "300"}

_CREW = """
import contextlib, json, os, pathlib, signal, sys, time, traceback
import torch
import kdcache.training, kdcache.store, kdcache.training.run.training_progress, kdcache_cli.torchrun
from kdcache_cli.app import main
from warm_training import warm_up

warm_up()  # seconds, which no training then pays again
# Nobody ends the other processes here as torchrun does, however late the first one is.
kdcache_cli.torchrun.GRACE_S = 0.1

def exchanging_threads():
    names = []
    for task in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.append(task.read_text())
    return [name for name in names if "gloo" in name]

for line in sys.stdin:
    job = json.loads(line)
    pids = []
    for rank, prelude in enumerate(job["preludes"]):
        pid = os.fork()
        if pid == 0:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(job["preludes"])}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"], "TORCHELASTIC_RUN_ID": "crew"}
            os.environ |= {name: str(value) for name, value in world.items()}
            for number, stream in ((1, sys.stdout), (2, sys.stderr)):
                stream.flush()
                os.dup2(os.open(f"{job['logs']}/{rank}.{number}", os.O_CREAT | os.O_WRONLY), number)
            code = 1
            try:
                exec(prelude)
                if job["words"]:
                    main(job["words"])
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            if code in (0, 130) and exchanging_threads():  # they abort some process that ends, once in many
                print(exchanging_threads(), "are left", file=sys.stderr)
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    codes, ends, ending = {}, time.monotonic() + job["limit"], signal.SIGTERM
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] not in (0, 130):  # torchrun does not wait; here the others may end by themselves first
                ends = min(ends, time.monotonic() + 20)
        elif time.monotonic() > ends:
            for other in set(pids) - set(codes):
                os.kill(other, ending)
            ends, ending = time.monotonic() + 20, signal.SIGKILL
        else:
            time.sleep(0.01)
    print(json.dumps([codes[pid] for pid in pids]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """Of all processes, by rank."""

    codes: list[int]
    out: list[str]
    err: list[str]


class Crew:
    """A process that has everything imported and forks the processes of a training."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._jobs = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CREW],
            cwd=Path(__file__).parents[1],  # where warm_training.py is
            env=os.environ | ONE_THREAD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, words: list[str], ranks: int, preludes: dict[int, str]) -> list[int]:
        self._jobs += 1
        self._logs().mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"words": words, "preludes": [preludes.get(rank, "") for rank in range(ranks)], "port": port}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job | {"logs": str(self._logs()), "limit": LIMIT_S}) + "\n")
        self._process.stdin.flush()
        return self._line()

    def wait(self) -> Ended:
        codes = self._line()
        out, err = (
            [(self._logs() / f"{rank}.{number}").read_text() for rank in range(len(codes))] for number in (1, 2)
        )
        return Ended(codes, out, err)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _logs(self) -> Path:
        return self._folder / str(self._jobs)

    def _line(self) -> list[int]:
        assert self._process.stdout is not None
        actual: list[int] = json.loads(self._process.stdout.readline())
        return actual


@pytest.fixture(scope="session")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    crew = Crew(tmp_path_factory.mktemp("crew"))
    yield crew
    crew.close()


@pytest.fixture
def go(crew: Crew) -> Callable[..., Ended]:
    """go(settings, run, ranks=2, preludes={rank: code}, resume=False): trains to the end, whatever that is."""

    def run(settings: dict[str, Any], out: Path, ranks: int = 2, *, resume: bool = False, **options: Any) -> Ended:
        crew.start(words_of(settings, out, resume=resume), ranks, options.get("preludes", {}))
        return crew.wait()

    return run


@pytest.fixture(scope="session")
def uneven_path(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which half of the images have next to no label."""
    root = write_scenes(tmp_path_factory.mktemp("uneven") / "data", "scenes:32x48,train=6,val=3")
    for path in sorted((root / "labels" / "train").glob("*.png"))[:3]:
        label = np.array(Image.open(path))
        label[2:] = 255
        Image.fromarray(label).save(path)
    return make_cache(data=str(root))


@pytest.fixture
def uneven(student: dict[str, Any], uneven_path: Path) -> dict[str, Any]:
    """A short distillation whose processes count different numbers of pixels, for both terms.

    Slow enough that rounding stays rounding: torch's own BatchNorm on a CPU has gradients that are off by 1e-5 beside
    float64 (those of two processes: 2e-6), which ten times this rate turns into 1e-4 of the loss in 15 steps.
    """
    changes = {"batch_size": 4, "iterations": 6, "val_every": 3, "gradients_every": 4, "lr": 0.002, "seed": 3}
    changes |= {
        "cache": str(uneven_path),
        "optimizer": "sgd",
        "class_weights": "sqrt",
        "distill_void": False,
        "ema": 0.8,
    }
    return student | changes


def words_of(settings: dict[str, Any], out: Path, *, resume: bool = False) -> list[str]:
    """The command line of some settings."""
    words = [settings["verb"], "--out", str(out), *(["--resume"] if resume else [])]
    left_out = {"verb", "val"} if settings["verb"] == "train-teacher" else {"verb"}  # a teacher's data has its own val
    for name, value in settings.items():
        if value is None or name in left_out:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, list):
            words += [word for entry in value for word in (f"--{flag}", str(entry))]
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def close(one: Path, two: Path, read_metrics: Read) -> None:
    """Two runs are the same but for rounding."""
    pairs = list(zip(read_metrics(one), read_metrics(two), strict=True))
    for a, b in pairs:
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        tolerance = NORM if a["kind"] == "gradients" else LOSS
        for name in {"loss", "ce", "kl", "lr"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=tolerance), (a["kind"], a["step"], name)
        if "depth_rmse" in a:
            assert b["depth_rmse"] == pytest.approx(a["depth_rmse"], rel=1e-3), a["step"]
            assert b["depth_counted_images"] == a["depth_counted_images"], a["step"]
        if "miou" in a:  # a pixel or two between two classes
            assert b["miou"] == pytest.approx(a["miou"], abs=1e-3), a["step"]
    config = read_config(one)
    torch.manual_seed(config.optimizer.seed)
    begun = build_model(config.run.model, 7).deployed.state_dict()
    kinds = ("last",) if config.optimizer.ema is None else ("last", "last-ema")
    for which, statistics in itertools.product(kinds, (False, True)):
        weights, others = (load_file(run / f"{which}.safetensors") for run in (one, two))
        assert weights.keys() == others.keys()
        names = [name for name in begun if ("running" in name or "num" in name) == statistics]
        if not names:
            continue
        a, b, c = (torch.cat([state[name].double().flatten() for name in names]) for state in (weights, others, begun))
        assert (a - b).norm() <= WEIGHT * (a - c).norm(), (which, statistics, float((a - b).norm() / (a - c).norm()))


def test_two_processes_train_from_a_join_as_from_one_cache(
    student: dict[str, Any],
    cache_path: Path,
    make_cache: Callable[..., Path],
    go: Callable[..., Ended],
    tmp_path: Path,
    read_metrics: Read,
) -> None:
    taps = {"features": ("stage2",)}
    both, further = make_cache(**taps), make_cache(features_only=True, pixels="source", **taps)
    one = {"cache": str(both), "term": ["cosine,teacher_tap=stage2"]}
    join = {"cache": [str(cache_path), f"sam={further}"], "term": ["cosine,teacher_tap=sam:stage2"]}
    settings = student | {"val": None, "batch_size": 4, "augment": "warp", "flip": False, "lr": 1e-4}
    for name, changes, ranks in (("one", one, 2), ("join", join, 2), ("alone", join, 1)):
        ended = go(settings | changes, tmp_path / name, ranks)
        assert ended.codes == [0] * ranks, ended.err
    assert (tmp_path / "one/last.safetensors").read_bytes() == (tmp_path / "join/last.safetensors").read_bytes()
    close(tmp_path / "alone", tmp_path / "join", read_metrics)


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def panels(ended: Ended) -> str:
    """The message of the only process that wrote one."""
    assert all(not text for text in (*ended.out, *ended.err[1:])), ended
    assert ended.err[0].count("─ error ─") == 1, ended.err[0]
    return ended.err[0]


# --- the same as one process -------------------------------------------------------------------------------

_SPARE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 5, 4, 2), nn.BatchNorm2d(12, momentum=None), nn.ReLU())
        self.head, self.spare = nn.Conv2d(12, num_classes, 1), nn.Conv2d(12, 3, 1)

    def forward(self, x):
        return self.head(self.body(x))

def build(num_classes=7):
    return Net(num_classes)
"""


_TWO_LEVELS = 'b,labels=none,method=none,"term=adversarial,weight=0.1","term=adversarial,head=auxiliary,weight=0.1"'
_CONSISTENT = 'b,labels=none,method=none,"term=consistency,by=ema,threshold=0.15,normalise=share"'


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_grad": 0.1, "workers": 2, "distill_void": True, "optimizer": "adam", "lr": 1e-4},
        {"model": "spare", "method": "none", "distill_void": None},
        {"method": "kl+dist+pseudo", "batch_size": 4},
        {"mix": "classmix", "gate": "confidence:0.5", "class_balance": "sqrt", "batch_size": 4},
        {"stream": ["a,share=0.75,method=kl+dist", "b,method=none,weight=0.5"], "batch_size": 8},
        {"stream": ["a,share=0.25", "b,method=kl+pseudo,paste=classmix,paste-from=a"], "batch_size": 8},
        {"stream": ["a,method=kl", _CONSISTENT], "ema": 0.9, "batch_size": 8},
        {
            "model": "kdcache:tiny+aux",
            "stream": ["a,method=none", _TWO_LEVELS],
            "distill_void": None,
            "optimizer": "adam",
            "lr": 1e-4,
            "batch_size": 8,
        },
    ],
    ids=["uneven", "clipped", "unused parameters", "terms", "mixed", "streams", "pasted", "consistency", "auxiliary"],
)
def test_two_processes_train_as_one(
    changes: dict[str, Any],
    uneven: dict[str, Any],
    go: Callable[..., Ended],
    tmp_path: Path,
    read_metrics: Read,
) -> None:
    settings = uneven | changes
    if settings["model"] == "spare":
        (tmp_path / "spare.py").write_text(_SPARE)
        settings["model"] = f"{tmp_path}/spare.py:build"
    alone = go(settings, tmp_path / "one", 1)
    assert alone.codes == [0], alone.err
    ended = go(settings, tmp_path / "two", 2)
    assert ended.codes == [0, 0], ended.err
    close(tmp_path / "one", tmp_path / "two", read_metrics)
    assert ended.out[1] == ended.err[1] == ""
    assert ended.out[0].count("best mIoU") == 1
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0].keys() == results[1].keys()
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]


def test_two_processes_learn_the_balance_of_two_tasks_as_one(
    uneven: dict[str, Any], go: Callable[..., Ended], tmp_path: Path, read_metrics: Read
) -> None:
    """Half of the samples have labels of each task, so that the processes count different numbers of pixels of both."""
    data = "scenes:32x48,train=6,val=3,depth=exact,tasks=halves"
    settings = uneven | {"cache": None, "data": data, "val": data, "size": "32x48", "model": "kdcache:tiny+depth"}
    settings |= {"method": "depth-silog", "balance": "uncertainty", "distill_void": None}
    for name, ranks in (("one", 1), ("two", 2)):
        ended = go(settings, tmp_path / name, ranks)
        assert ended.codes == [0] * ranks, ended.err
    close(tmp_path / "one", tmp_path / "two", read_metrics)
    assert read_metrics(tmp_path / "two", "validation")[0]["depth_counted_images"] > 1
    for task in ("segmentation", "depth"):
        one, two = (
            [line["tasks"][task]["weight"] for line in read_metrics(tmp_path / name, "train")]
            for name in ("one", "two")
        )
        assert two == pytest.approx(one, rel=LOSS)
        assert one[-1] != pytest.approx(one[0], rel=1e-4)  # it is learnt


def test_parts_of_the_shares_of_two_processes_are_the_batch(
    uneven: dict[str, Any], go: Callable[..., Ended], tmp_path: Path, read_metrics: Read
) -> None:
    """Without BatchNorm, and with parameters that get no gradient."""
    code = _SPARE.replace("nn.BatchNorm2d(12, momentum=None)", "nn.GroupNorm(3, 12)")
    assert "BatchNorm" not in code
    (tmp_path / "spare.py").write_text(code)
    settings = uneven | {"model": f"{tmp_path}/spare.py:build", "clip_grad": 0.1}
    assert go(settings, tmp_path / "one", 1).codes == [0]
    ended = go(settings | {"accumulate": 2}, tmp_path / "two", 2)
    assert ended.codes == [0, 0], ended.err
    close(tmp_path / "one", tmp_path / "two", read_metrics)


@pytest.mark.parametrize("hungry", [(0, 1), (1,)])
def test_a_process_out_of_memory_ends_all(
    hungry: tuple[int, ...], uneven: dict[str, Any], model_file: Any, go: Callable[..., Ended], tmp_path: Path
) -> None:
    settings = uneven | {"model": model_file("hungry", "cuda"), "val": None}
    room = {
        rank: f"import os; os.environ |= {{'LIMIT': '{9 * (rank not in hungry)}', 'LIMIT_EVAL': '9'}}"
        for rank in (0, 1)
    }
    ended = go(settings, tmp_path / "run", 2, preludes=room)
    assert ended.codes == [2, 2], ended.err
    rule = "Out of memory" if 0 in hungry else "Another process of the training has gone"
    assert rule in ended.err[0]
    assert "Traceback" not in "".join(ended.err)


def test_projections_of_terms_are_learnt_together(
    student: dict[str, Any], make_cache: Callable[..., Path], go: Callable[..., Ended], tmp_path: Path
) -> None:
    """Processes that each followed their own half would end far apart."""
    settings = student | {"cache": str(make_cache(features=("head",))), "method": "kl+hint+sp", "val": None}
    settings |= {"flip": True}
    settings |= {"batch_size": 4, "iterations": 4, "lr": 1e-3}
    states = []
    for name, ranks, iterations in (("begun", 1, 1), ("one", 1, 4), ("two", 2, 4)):
        ended = go(settings | {"iterations": iterations, "val_every": 1}, tmp_path / name, ranks)
        assert ended.codes == [0] * ranks, ended.err
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["criterion"]
        states.append(torch.cat([tensor.flatten() for tensor in state.values()]))
    begun, one, two = states
    assert (one - begun).norm() > 0
    assert (two - one).norm() <= 0.05 * (one - begun).norm()


def test_the_ring_of_summaries_is_that_of_one_process(
    student: dict[str, Any], make_cache: Callable[..., Path], go: Callable[..., Ended], tmp_path: Path, scenes: str
) -> None:
    """To the last bit: it holds what the teacher said, in the order in which samples were drawn."""
    model = load_teacher(Backbone(), open_split(scenes, "train")).model
    cache = make_cache(model=model, features=("pool",), views=2)
    settings = student | {"cache": str(cache), "method": "none", "term": ["queue,length=5"], "val": None}
    settings |= {"batch_size": 4, "iterations": 4, "val_every": 4}
    rings = []
    for ranks in (1, 2):
        ended = go(settings, tmp_path / str(ranks), ranks)
        assert ended.codes == [0] * ranks, ended.err
        state = torch.load(tmp_path / str(ranks) / "checkpoint.pt", weights_only=True)["criterion"]
        assert int(state["streams.0.further.0.seen_images"]) == 16
        rings.append(state["streams.0.further.0.ring"])
    assert rings[0].norm(dim=1).min() > 0.99
    assert torch.equal(*rings)


def test_a_teacher_trains_on_two_processes_and_more_than_there_are_images_to_validate(
    settings: dict[str, Any], go: Callable[..., Ended], tmp_path: Path, read_metrics: Read
) -> None:
    short = settings | {"batch_size": 4, "iterations": 4, "optimizer": "sgd"}
    short |= {"val": "scenes:32x48,train=6,val=1", "data": "scenes:32x48,train=6,val=1"}
    for ranks in (1, 2):
        assert go(short, tmp_path / str(ranks), ranks).codes == [0] * ranks
    close(tmp_path / "1", tmp_path / "2", read_metrics)


def halves(batch: Batch) -> list[Batch]:
    size = len(batch) // 2
    return [batch.rows(size, first) for first in (0, size)]


@pytest.mark.parametrize("distill_void", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_losses_of_parts_average_to_the_whole_s(
    weighted: bool, distill_void: bool, cache_path: Path, batches: list[Streams]
) -> None:
    cache = open_cache(cache_path)
    (batch,) = batches[0]
    batch.label[1, 3:] = 255  # a naive average would weigh these few pixels as much as all of the other half
    weight = torch.linspace(0.1, 2, cache.num_classes) if weighted else None
    loss = DistillLoss(cache, ce_weight=0.7, kl_weight=1.3, class_weight=weight, distill_void=distill_void)
    logits = torch.randn(2, cache.num_classes, 8, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    whole = loss(logits, batch)
    (expected,) = torch.autograd.grad(whole.loss, logits)

    own = [loss.counts(part) for part in halves(batch)]
    assert own[0].ce != own[1].ce
    mean = mean_counts(own)
    parts = [loss(z, part, mean) for part, z in zip(halves(batch), logits.split(1), strict=True)]
    actual = torch.stack([row(part) for part in parts]).mean(0)
    torch.testing.assert_close(actual, row(whole), rtol=2e-6, atol=0)
    (gradient,) = torch.autograd.grad((parts[0].loss + parts[1].loss) / 2, logits)
    assert (gradient - expected).norm() <= 2e-6 * expected.norm()


_NORMS = """
import torch.distributed as dist
from torch import nn
from kdcache.training.step.ddp import HostBatchNorm, share_statistics
dist.init_process_group("gloo")
rank = dist.get_rank()
for momentum, dtype in ((0.1, torch.float32), (None, torch.float32), (0.3, torch.bfloat16)):
    torch.manual_seed(0)
    whole, part = (nn.Sequential(nn.BatchNorm2d(5, momentum=momentum)) for _ in range(2))
    share_statistics(part, torch.device("cpu"))
    assert isinstance(part[0], HostBatchNorm)
    for model in (whole, part):
        nn.init.uniform_(model[0].weight, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        x = (3 + 20 * torch.randn(5, 5, 7, 3)).to(dtype)
        x[:2] += 100
        dy = torch.randn(5, 5, 7, 3).to(dtype)
        mine = slice(0, 2) if rank == 0 else slice(2, 5)
        a, b = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        y, z = whole(a), part(b)
        assert z.dtype == dtype
        (y * dy).sum().backward()
        (z * dy[mine]).sum().backward()
        own = [p.grad for p in part.parameters()]
        for gradient in own:
            dist.all_reduce(gradient)
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        pairs = [(y[mine], z), (a.grad[mine], b.grad), *zip([p.grad for p in whole.parameters()], own)]
        for one, two in [*pairs, *zip(whole.state_dict().values(), part.state_dict().values())]:
            one, two = one.double(), two.double()
            assert (one - two).norm() <= tolerance * one.norm(), (momentum, dtype, one, two)
        for model in (whole, part):
            model.zero_grad()
    assert whole.state_dict().keys() == part.state_dict().keys()
    assert torch.equal(part.eval()(x), part[0](x)) and part.training is False
dist.destroy_process_group()
"""


def test_batch_norm_on_a_cpu_takes_the_statistics_of_the_whole_batch(crew: Crew) -> None:
    crew.start([], 2, {0: _NORMS, 1: _NORMS})
    ended = crew.wait()
    assert ended.codes == [0, 0], ended.err


_STARTS_LATE = """
signal.alarm(60)
os.environ |= {"MASTER_PORT": "<port>", "TORCHELASTIC_USE_AGENT_STORE": "True"}
from kdcache.training.distributed import processes
time.sleep(<delay>)
with processes() as world:
    assert world.gather(world.rank) == [0, 1]
    os._exit(0)
"""


@pytest.mark.parametrize("late", [0, 1])
def test_processes_that_torchrun_starts_again_do_not_wait_for_those_that_died(late: int, crew: Crew) -> None:
    """torchrun keeps the store of those that died, with their addresses. Any process may be there a second earlier."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(3):
        prelude = _STARTS_LATE.replace("<port>", str(store.port))
        crew.start([], 2, {rank: prelude.replace("<delay>", str(int(rank == late))) for rank in (0, 1)})
        ended = crew.wait()
        assert ended.codes == [0, 0], ended.err


# --- stopping and going on ---------------------------------------------------------------------------------


@pytest.fixture
def long(uneven: dict[str, Any]) -> dict[str, Any]:
    return uneven | {"iterations": LONG, "val_every": 8, "gradients_every": 7}


def test_a_killed_process_ends_all_and_the_run_goes_on_to_the_same_bytes(
    long: dict[str, Any],
    crew: Crew,
    go: Callable[..., Ended],
    model_file: Callable[[str], str],
    tmp_path: Path,
    read_metrics: Read,
) -> None:
    settings = long | {"model": model_file("dropout")}  # every process goes on with its own random numbers
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert go(settings, whole).codes == [0, 0]
    pids = crew.start(words_of(settings, killed), 2, {})
    wait_until(lambda: lines_of(killed) > 12)  # after the first checkpoint
    os.kill(pids[1], signal.SIGKILL)
    ended = crew.wait()
    assert ended.codes == [2, -signal.SIGKILL]
    assert "Another process of the training has gone" in ended.err[0]
    assert (killed / "checkpoint.pt").exists()
    assert go(settings, killed, resume=True).codes == [0, 0]
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    logs = [[(row["step"], row["loss"]) for row in read_metrics(run, "train")] for run in (whole, killed)]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_the_number_of_processes_may_change_on_resume(
    before: int,
    after: int,
    long: dict[str, Any],
    crew: Crew,
    go: Callable[..., Ended],
    tmp_path: Path,
    read_metrics: Read,
) -> None:
    assert go(long, tmp_path / "whole", 1).codes == [0]
    pids = crew.start(words_of(long, tmp_path / "run"), before, {})
    wait_until(lambda: lines_of(tmp_path / "run") >= 4)
    for pid in reversed(pids):  # at different moments
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.02)
    ended = crew.wait()
    assert ended.codes == [130] * before, ended.err
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert step == read_metrics(tmp_path / "run", "train")[-1]["step"] < LONG
    assert f"Stopped after {step} iterations" in ended.err[0]
    assert all(not text for text in ended.err[1:])
    assert go(long, tmp_path / "run", after, resume=True).codes == [0] * after
    close(tmp_path / "whole", tmp_path / "run", read_metrics)


def test_one_process_that_is_asked_to_stop_stops_all(
    long: dict[str, Any], crew: Crew, tmp_path: Path, read_metrics: Read
) -> None:
    pids = crew.start(words_of(long | {"iterations": 4000, "val_every": 4000}, tmp_path / "run"), 2, {})
    wait_until(lambda: lines_of(tmp_path / "run") >= 4)
    os.kill(pids[1], signal.SIGINT)
    assert crew.wait().codes == [130, 130]
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert step == read_metrics(tmp_path / "run", "train")[-1]["step"] < 4000


# --- errors ------------------------------------------------------------------------------------------------

_FAILS = """
from kdcache.errors import CorruptError, DataError, StoreError
from kdcache.metrics import predictions as run
from kdcache.training.run import checkpointing as state
from kdcache.training import trainer

def fail(error, after=0):
    calls = []
    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise error
        return real(*arguments, **options)
    return failing

"""
_CORRUPT = (
    _FAILS
    + "real = trainer.next_batch\n"
    + "trainer.next_batch = fail(CorruptError('Damaged record 3: chunks are whole', fix='build'), 2)\n"
)
_FOREIGN = _FAILS + "real = trainer.next_batch\ntrainer.next_batch = fail(OSError('the cable is loose'), 2)\n"
_UNREADABLE = _FAILS + "run.render = fail(DataError('Cannot read three.png', fix='look'))\n"
_FULL = _FAILS + "state.save_checkpoint = fail(StoreError('the disk has room', fix='free'))\n"


@pytest.mark.parametrize(
    ("rank", "prelude", "words"),
    [
        (1, _CORRUPT, "record 3"),
        (0, _CORRUPT, "record 3"),
        (1, _FOREIGN, "Process 1 failed: OSError: the cable is loose"),
        (0, _FOREIGN, "OSError: the cable is loose"),
        (1, _UNREADABLE, "three.png"),
        (0, _FULL, "the disk has room"),
    ],
)
def test_what_fails_on_one_process_ends_all_with_one_message(
    rank: int, prelude: str, words: str, uneven: dict[str, Any], go: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = go(uneven, tmp_path / "run", preludes={rank: prelude})
    assert ended.codes == [2, 2], ended.err
    assert words in panels(ended)
    assert not (tmp_path / "run" / "result.json").exists()


_NAN = """
import os, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body, self.calls = nn.Conv2d(3, num_classes, 3, 4, 1), 0

    def forward(self, x):
        self.calls += self.training
        y = self.body(x)
        return y * torch.nan if self.calls == 5 and os.environ.get("RANK") == "1" else y

def build(num_classes=7):
    return Net(num_classes)
"""


def test_a_loss_that_is_no_number_on_one_process_is_so_on_all(
    uneven: dict[str, Any], go: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "nan.py").write_text(_NAN)
    changed = uneven | {"model": f"{tmp_path}/nan.py:build", "val_every": 2, "val": None}
    ended = go(changed, tmp_path / "run")
    assert ended.codes == [2, 2], ended.err
    assert "at iteration 4" in panels(ended)  # the first of five calls was a rehearsal
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def check_said_by_the_first(ended: Ended) -> None:
    """The other one waits for the first one's end, which ends it as well, perhaps before it came to know."""
    assert ended.codes[0] == 2, ended.err
    assert ended.codes[1] in (2, -signal.SIGTERM), ended.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 3}, "--batch-size 3 evenly: 2 processes"),
        ({"step": "graphed"}, "--step graphed with 2 processes"),
        ({"step": "compiled"}, "--step compiled with 2 processes"),
        ({"lr": -1.0}, "--lr"),
        ({"size": "axb"}, "size"),
        ({"model": "kdcache:tinny"}, "kdcache:tinny"),
    ],
)
def test_wrong_settings_are_said_once_and_nothing_is_written(
    changes: dict[str, Any], words: str, uneven: dict[str, Any], go: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = go(uneven | changes, tmp_path / "run")
    check_said_by_the_first(ended)
    assert words in ended.err[0]
    assert (ended.out[1], ended.err[1]) == ("", "")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_said_once(
    uneven: dict[str, Any], go: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ended = go(uneven, tmp_path)
    check_said_by_the_first(ended)
    assert "something else" in panels(ended)


@pytest.mark.parametrize(("batch", "size", "remedy"), [(7, 2, "6 or 8"), (1, 4, "4"), (9, 6, "6 or 12")])
def test_a_batch_is_shared_evenly(batch: int, size: int, remedy: str) -> None:
    World(0, size).check_batch_size(size * 3)
    with pytest.raises(RecipeError) as caught:
        World(0, size).check_batch_size(batch)
    assert f"--batch-size {batch} evenly: {size} processes" in caught.value.problem
    assert f"--batch-size {remedy}," in caught.value.fix


def test_steps_are_eager_and_every_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_step("auto", torch.device("cuda"), 2) == choose_step("eager", torch.device("cuda"), 2) == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert [str(pick_device(name, World(3, 4, 1))) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert str(pick_device("cuda:1")) == "cuda:1"
    for name, local in (("cuda:0", 0), ("cuda", 2)):
        with pytest.raises(RecipeError, match=f"--device {name} for process {local} of .* 2 GPUs"):
            pick_device(name, World(local, 4, local))


def test_random_numbers_of_processes_differ() -> None:
    seeds = {World(rank, 4).seed(7, step) for rank in range(4) for step in (0, 10)}
    assert len(seeds) == 7
    assert World(0, 4).seed(7, 10) == World().seed(7, 0) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_processes_draw_different_dropout(settings: dict[str, Any], go: Callable[..., Ended], tmp_path: Path) -> None:
    """By the states of the generators that dropout draws from, from which each process goes on after a resume."""
    ended = go(settings | {"batch_size": 4, "iterations": 1, "val_every": 1}, tmp_path / "run")
    assert ended.codes == [0, 0], ended.err
    random = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["random"]
    assert len(random["others"]) == 1
    assert not torch.equal(random["cpu"], random["others"][0]["cpu"])


# --- torchrun ----------------------------------------------------------------------------------------------


class Torchrun:
    """torchrun with two processes of the command line, whose output goes to files: pipes would fill, or stay open."""

    def __init__(
        self, folder: Path, words: list[str], *options: str, program: tuple[str, ...] = ("-m", "kdcache_cli")
    ) -> None:
        folder.mkdir()
        self.out, self.err = folder / "out", folder / "err"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, *program, *words], env=os.environ | ONE_THREAD, stdout=out, stderr=err
            )

    def wait_for_lines(self, run: Path, count: int) -> None:
        """Wait until a run's log has so many lines."""
        self._wait(lambda: lines_of(run) >= count, f"{count} lines of a log")

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        self._wait(lambda: self.process.poll() is not None, "its end")
        return self.process.returncode

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > end:
                self.process.terminate()  # its processes first: it waits 30 s for them
                self.process.wait(60)
                pytest.fail(f"{what}: {'ended before' if ended else f'not in {LIMIT_S} s'}\n{self.err.read_text()}")
            time.sleep(0.002)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """What torchrun starts instead of `-m kdcache_cli`: processes that import nothing."""
    with ForkServer(tmp_path_factory.mktemp("forks"), **ONE_THREAD) as server:
        yield "--no-python", str(server.program)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_torchrun_s_processes_say_what_is_wrong_once(
    uneven: dict[str, Any], forked: tuple[str, ...], tmp_path: Path
) -> None:
    words = words_of(uneven | {"batch_size": 3}, tmp_path / "run")
    started = Torchrun(tmp_path / "torchrun", words, program=forked)
    assert started.wait() != 0
    err = started.err.read_text()
    assert err.count("--batch-size 3 evenly: 2 processes") == 1
    assert err.count("exitcode  : 2") == 2
    assert not started.out.read_text()


@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT_S)
def test_torchrun_is_stopped_by_a_signal_and_goes_on(
    long: dict[str, Any], go: Callable[..., Ended], tmp_path: Path, read_metrics: Read
) -> None:
    run = tmp_path / "run"
    started = Torchrun(tmp_path / "torchrun", words_of(long, run))
    started.wait_for_lines(run, 4)
    started.process.send_signal(signal.SIGTERM)
    assert started.wait() != 0
    assert started.err.read_text().count("the state is saved") == 1
    step = torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert step == read_metrics(run, "train")[-1]["step"] < LONG
    assert go(long, run, 1, resume=True).codes == [0]
    assert read_metrics(run, "train")[-1]["step"] == LONG


@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT_S)
def test_torchrun_restarts_after_a_killed_process_to_the_same_weights(
    long: dict[str, Any], go: Callable[..., Ended], forked: tuple[str, ...], tmp_path: Path, read_metrics: Read
) -> None:
    """One command with --resume: it begins the run, and goes on with it when torchrun starts it again."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert go(long, whole).codes == [0, 0]
    started = Torchrun(tmp_path / "torchrun", words_of(long, run, resume=True), "--max-restarts", "3", program=forked)
    started.wait_for_lines(run, 13)  # after the first checkpoint
    os.kill(ranks_of(started.process.pid)[1], signal.SIGKILL)
    assert started.wait() == 0, started.err.read_text()
    assert started.out.read_text().count("best mIoU") == 1
    assert json.loads((run / "result.json").read_text())["iterations"] == LONG
    assert read_metrics(run, "train")[-1]["step"] == LONG
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (run / name).read_bytes()


def ranks_of(launcher: int) -> dict[int, int]:
    """Process numbers of torchrun's children, by rank."""
    ranks = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((int(entry[5:]) for entry in variables if entry.startswith(b"RANK=")), None)
        if rank is not None:
            ranks[rank] = int(child)
    return ranks
