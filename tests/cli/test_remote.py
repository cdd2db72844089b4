"""The command line with a store in an object store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from s3 import CREDENTIALS, SECRET, TOKEN

STUDENT = "--model kdcache:tiny --batch-size 2 --val-every 2 --log-every 1 --seed 3"


@pytest.mark.slow
def test_the_whole_way_through_a_bucket(world, cli, tree, s3, tmp_path) -> None:
    """Build, inspect, verify, train from copies that are not there yet, go on, and copy back: as from a disk."""
    data, address, copies = world / "data", s3.address(), tmp_path / "copies of its own"
    build = f"build-teacher-cache --data {data} --teacher {world}/teacher --shard-records 4 --views full --out".split()
    built = cli(*build, address)
    assert built.code == 0, built.err
    assert f"{address}: 6 records" in built.out
    assert "mIoU" in built.out
    assert s3.objects(address).keys() == tree(world / "store.zarr").keys()
    assert "(6 from before)" in cli(*build, address).out

    inspected = cli("inspect", address, "--json")
    assert json.loads(inspected.out)["path"] == address
    verified = cli("verify", address, "--teacher", world / "teacher", "--cache-dir", copies, "--cache-bytes", "1MiB")
    assert verified.code == 0, verified.err
    assert "the cache holds the targets of this teacher" in verified.out

    shutil.rmtree(copies)
    s3.reset()
    train = f"train-student --val {data} {STUDENT} --cache-bytes 1MB --iterations"
    far = cli(*f"{train} 4 --cache {address} --out {tmp_path}/far".split(), "--cache-dir", copies)
    assert far.code == 0, far.err
    # The index of ids is read by the seal's check and again by whoever needs ids; a shard of records once.
    shards = [key for request in s3.requests if "/c/" in (key := request.key) and "/samples/" not in key]
    assert s3.counted("PUT") == 0
    assert len(shards) == len(set(shards)) > 6
    assert list(copies.glob("mirrors/*/targets/segmentation/values/c/*/0/0/0"))

    near = cli(*f"{train} 4 --cache {world}/store.zarr --shuffle window --out {tmp_path}/near".split())
    assert near.code == 0, near.err
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("far", "near")
    ]
    assert losses[0] == losses[1]
    s3.reset()
    shutil.rmtree(copies)
    again = cli(*f"{train} 4 --resume --cache {address} --out {tmp_path}/far --cache-dir {tmp_path}/others".split())
    assert again.code == 0, again.err

    every = b"".join(tree(tmp_path / "far").values()) + (built.out + far.out + far.err + again.out).encode()
    for secret in (SECRET, TOKEN, CREDENTIALS["AWS_ACCESS_KEY_ID"] + "/"):
        assert secret.encode() not in every

    values = next(key for key in s3.objects(address) if key.startswith("targets/segmentation/values/c/"))
    s3.put(address, values, b"x")
    damaged = cli("verify", address)
    assert damaged.code == 1
    assert f"{address}/{values}" in damaged.out
    assert "Delete these files. Run the command that wrote it" in damaged.out


@pytest.mark.parametrize("text", ["", "much", "-5", "0", "5 XB", "GiB"])
def test_bytes_that_are_none(made, cli, tmp_path, text) -> None:
    words = ["train-student", "--cache", made / "store.zarr", "--model", "kdcache:tiny", "--out", tmp_path / "run"]
    for command in (words, ["inspect", made / "store.zarr"], ["verify", made / "store.zarr"]):
        ended = cli(*command, f"--cache-bytes={text}")
        assert ended.code == 2
        assert "50GiB" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_remote_cache_without_obstore(tmp_path) -> None:
    code = "import sys; sys.modules['obstore'] = None; from kdcache_cli.app import main; main(sys.argv[1:])"
    words = ["train-student", "--cache", "s3://bucket/x", "--model", "kdcache:tiny", "--out", str(tmp_path / "run")]
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "pip install '.[remote]'" in ended.stderr
    assert not (tmp_path / "run").exists()
