"""The pool of threads: every task once, errors out, safe under concurrency and after a fork."""

import importlib.util
import os
import threading

import pytest
import torch

from kdcache_kernels.cpu import threads


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def mark(first, last, done):
    for task in range(first, last):
        done[task] += 1


@pytest.mark.parametrize("num_tasks", [0, 1, 2, 3, 13, 1000])
def test_every_task_is_done_once(num_tasks):
    done = [0] * num_tasks
    threads.run(mark, num_tasks, done)
    assert done == [1] * num_tasks


def test_several_threads_take_part():
    meeting = threading.Barrier(3, timeout=30)  # passed only when three are inside at once
    seen = set()

    def kernel(first, last):
        if len(seen) < 3:
            seen.add(threading.get_ident())
            meeting.wait()

    threads.run(kernel, 3)
    assert len(seen) == 3


@pytest.mark.parametrize(("nanoseconds", "chunks"), [(0, 1), (199_999, 1), (250_000, 2), (10**9, 12)])
def test_a_chunk_is_worth_a_tenth_of_a_millisecond(nanoseconds, chunks):
    """At most four for each of three threads; one is the calling thread's."""
    seen = []

    def kernel(first, last):
        seen.append((first, last, threading.get_ident()))

    threads.run(kernel, 1000, nanoseconds=nanoseconds)
    assert len(seen) == chunks
    assert sorted(edges for *edges, _ in seen)[-1][1] == 1000
    if chunks == 1:
        assert seen == [(0, 1000, threading.get_ident())]


def test_an_error_comes_out_and_the_pool_goes_on():
    def kernel(first, last):
        raise ArithmeticError(f"task {first}")

    with pytest.raises(ArithmeticError, match="task"):
        threads.run(kernel, 100)
    test_every_task_is_done_once(100)


def test_concurrent_and_nested_calls():
    totals = []

    def nested(first, last, done):
        threads.run(mark, 10, [0] * 10)
        mark(first, last, done)

    def caller():
        for _ in range(20):
            done = [0] * 17
            threads.run(nested, 17, done)
            totals.append(done == [1] * 17)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(timeout=60)
    assert totals == [True] * 80


def test_after_a_fork():
    test_every_task_is_done_once(100)  # the pool has threads, which the child will not have
    child = os.fork()
    if child == 0:
        done = [0] * 100
        threads.run(mark, 100, done)
        os._exit(0 if done == [1] * 100 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_forks(monkeypatch):
    """On Windows, where os has no `register_at_fork`, the pool works as anywhere."""
    monkeypatch.delattr(os, "register_at_fork")
    spec = importlib.util.spec_from_file_location("threads_anew", threads.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    done = [0] * 100
    anew.run(mark, 100, done)
    assert done == [1] * 100
