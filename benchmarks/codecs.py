"""The cost and error of each codec: bytes per record, and the stored targets beside the teacher's own.

Builds one store per codec from the same teacher and split, and reports from their manifests and ledgers.

    python benchmarks/codecs.py --data camvid --teacher runs/teacher --json benchmarks/results/codecs-cpu.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import header, run, write
from kdcache.data import Split, open_split
from kdcache.store import open_cache, summarise
from kdcache.teacher import BuildOptions, Teacher, build_cache, load_teacher

CODECS = ("default", "small", "none")


def built(split: Split, teacher: Teacher, options: BuildOptions, out: Path) -> dict[str, Any]:
    """Build a cache with one codec. Return its sizes and fidelity."""
    build_cache(split, teacher, out, options)
    summary = summarise(open_cache(out))
    assert summary.manifest.fidelity is not None
    arrays = {array.path: round(array.ratio, 3) for array in summary.arrays if "records/" not in array.path}
    return {
        "codec": options.codec,
        "records": summary.manifest.records,
        "bytes_per_record": round(summary.bytes_per_record),
        "target_bytes_per_record": round(summary.target_bytes_per_record),
        "full_resolution_bytes": summary.full_resolution_bytes,
        "compression": arrays,
        "fidelity": summary.manifest.fidelity.model_dump(),
    }


def main() -> None:
    """Build a store with each codec, print its cost and error, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    split = open_split(arguments.data, "train")
    teacher = load_teacher(arguments.teacher, split.classes)
    assert teacher.size is not None
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for codec in CODECS:
            rows.append(built(split, teacher, BuildOptions(teacher.size, views=1, codec=codec), Path(work, codec)))
            print(json.dumps(rows[-1]))
    if arguments.json is not None:
        write(arguments.json, {**header("codecs"), "size": list(teacher.size), "codecs": rows})


if __name__ == "__main__":
    run(main)
