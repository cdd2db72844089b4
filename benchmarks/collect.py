"""Collect the runs of benchmarks/camvid.sh in one result file: recipe, time and metrics of each.

python benchmarks/collect.py OUT --data camvid --json benchmarks/results/camvid.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common import header, run, write
from kdcache.metrics import markdown_table
from kdcache.run_folder import Run
from kdcache.store import inspect_store


def read(path: Path) -> Any:
    """Return the content of a JSON file, or None if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main() -> None:
    """Collect recipe, result and evaluation of every run in a folder, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True, help="as it was given to camvid.sh, for the command")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    runs = {}
    for recipe in sorted(arguments.out.glob("*/recipe.toml")):
        finished = Run(recipe.parent)
        settings = {key: value for key, value in (finished.recipe or {}).items() if key not in ("data", "val", "cache")}
        runs[finished.folder.name] = {
            "recipe": settings,
            "result": finished.result or None,
            "evaluation": read(finished.folder / "evaluation-val.json"),
        }
    store = inspect_store(arguments.out / "camvid.zarr").to_json()
    for key in ("path", "arrays", "manifest"):
        store.pop(key)
    rows = []
    for name, found in runs.items():
        if found["evaluation"]:
            found["evaluation"] = {k: v for k, v in found["evaluation"].items() if k not in ("run", "data")}
            rows.append([name, *(f"{100 * found['evaluation'][key]:.2f}" for key in ("miou", "macc", "aacc"))])
    print(markdown_table(("run", "mIoU", "mAcc", "aAcc"), rows))
    write(arguments.json, {**header("training"), "made_by": "benchmarks/camvid.sh", "store": store, "runs": runs})


if __name__ == "__main__":
    run(main)
