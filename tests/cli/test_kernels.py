"""`kdcache kernels` as a user meets it; what it compiles is tests/bench/kernels/test_precompile.py."""

from __future__ import annotations

import pytest
import torch

from kdcache.bench import kernels
from kdcache.bench.kernels import Compiled

WRONG = {
    "architecture": ("--arch sm_9", "did you mean sm_90"),
    "no architecture": ("--arch titan", "'titan'"),
    "shape": ("--arch sm_90 --shapes 16x21x512", "'16x21x512'"),
    "case": ("--arch sm_90 --case gated", "did you mean 'gate'"),
    "dtype": ("--arch sm_90 --dtype fp8", "'fp8'"),
    "temperature": ("--arch sm_90 --temperature 0", "'0'"),
    "top-k": ("--arch sm_90 --top-k some", "'some'"),
}


@pytest.mark.parametrize(("words", "received"), WRONG.values(), ids=WRONG)
def test_wrong_input(cli, tmp_path, words, received) -> None:
    ended = cli("kernels", "compile", "--out", tmp_path / "out", *words.split())
    assert ended.code == 2, ended.out
    assert received in ended.err
    assert ended.err.count("received") == 1
    assert ended.err.count("remedy") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_architecture_is_named_where_there_is_no_gpu(cli) -> None:
    ended = cli("kernels", "compile")
    assert ended.code == 2
    assert "no GPU here" in ended.err


@pytest.mark.parametrize(
    ("words", "checks", "kinds"),
    [
        ("", True, set(kernels.KINDS)),
        ("--shapes 1x3x16x16/4 --case warp", False, {"warp"}),
        ("--shapes voc --check", True, set(kernels.KINDS)),
        ("--no-check", False, set(kernels.KINDS)),
    ],
)
def test_what_is_compiled(cli, tmp_path, monkeypatch, words, checks, kinds) -> None:
    asked = []

    def compile_ahead(request, processes, progress):
        progress("compiling", 1, 2)
        asked.append((request, processes))
        return Compiled(208, 200, 3 * 2**20)

    monkeypatch.setattr(kernels, "compile_ahead", compile_ahead)
    command = f"kernels compile --arch sm_90 --processes 3 --out {tmp_path} {words}"
    ended = cli(*command.split())
    assert ended.code == 0, ended.err
    assert "208 variants for sm_90: 200 compiled, 8 were there; 3.0 MiB" in ended.out
    assert f"TRITON_CACHE_DIR={tmp_path}" in ended.err
    ((request, processes),) = asked
    assert (request.arch, processes) == ("sm_90", 3)
    assert (request.check is not None) == checks
    assert {case.kind for case in request.cases} == kinds


def test_a_folder_that_is_none_is_refused(cli, tmp_path) -> None:
    ended = cli("kernels", "adopt", tmp_path)
    assert ended.code == 2
    assert "kdcache-kernels.json" in ended.err
