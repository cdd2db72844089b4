"""Commands as processes of their own that need no import: one server imports everything once and forks.

    with ForkServer(folder) as server:
        subprocess.run(["kdcache", "train-student", ...], env=server.environment(os.environ))

The program `kdcache` in the server's folder hands its words, environment, working folder and standard streams to the
server. The fork runs the command line, and the program ends as the fork ends. SIGINT and SIGTERM reach the fork, and
SIGKILL of the program kills it. The folder's `python` and `torchrun` are such forks, too, and the processes that this
`torchrun` starts are.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(process, number))
ended = int(answers.readline())
if ended < 0:
    signal.signal(-ended, signal.SIG_DFL)
    os.kill(os.getpid(), -ended)
sys.exit(ended)
"""


class ForkServer:
    """A process that has imported the command line, and a folder with the program `kdcache` that reaches it.

    `variables` are of the server's environment: for what is read when a library is imported.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self._bin, self._address, self._variables = folder / "bin", folder / "socket", variables
        self.program, self.python, self.torchrun = (self._bin / name for name in ("kdcache", "python", "torchrun"))

    def __enter__(self) -> ForkServer:
        self._bin.mkdir(parents=True)
        for program in (self.program, self.python, self.torchrun):
            text = CLIENT.format(python=sys.executable, address=str(self._address), name=program.name)
            program.write_text(text, encoding="utf-8")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        command, environment = [sys.executable, __file__, self._address], os.environ | self._variables
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._server.stdout is not None
        assert self._server.stdout.readline(), "the server did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.kill()
        self._server.communicate()

    def environment(self, of: Mapping[str, str]) -> dict[str, str]:
        """Return an environment in which `kdcache`, `python` and `torchrun` are the forked ones."""
        return {**of, "PATH": f"{self._bin}{os.pathsep}{of['PATH']}", "PYTHON_EXEC": str(self.python)}


def _serve(address: str) -> None:
    """Fork for every request; return in the fork, with its program and words as `sys.argv`.

    Tells a client who its process is and how it ended. Kills the process if the client is killed.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready = select.select([listener, *running, *(client for _, client in running.values())], [], [])[0]
        for ended in running.keys() & ready:
            process, client = running.pop(ended)
            os.close(ended)
            _, status = os.waitpid(process, 0)
            with contextlib.suppress(BrokenPipeError), client:
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        for process, client in running.values():
            if client in ready:
                os.kill(process, signal.SIGKILL)
        if listener in ready:
            client, _ = listener.accept()
            streams, request = _received(client)
            if not (process := os.fork()):
                break
            for stream in streams:
                os.close(stream)
            with contextlib.suppress(BrokenPipeError):
                client.sendall(f"{process}\n".encode())
            running[os.pidfd_open(process)] = process, client
    for inherited in (listener, client, *(client for _, client in running.values())):
        inherited.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for ended in running:
        os.close(ended)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    name, words, folder, environment = json.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it was of the server's environment
    sys.argv = [name, *words]


def _received(client: socket.socket) -> tuple[list[int], bytes]:
    """Return a client's standard streams and its request, which is not whole if the client was killed."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as file:
        return streams, file.read(int.from_bytes(size, "big"))


def _interpret() -> None:
    """Do what `python` does with `sys.argv`: -u, -W ACTION, then -m MODULE, -c TEXT or a file, then its words."""
    words = sys.argv[1:]
    while words[0] in ("-u", "-W"):
        if words.pop(0) == "-W":
            warnings.simplefilter(words.pop(0))  # type: ignore[arg-type]
    sys.path.insert(0, "" if words[0].startswith("-") else str(Path(words[0]).parent))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(words[1], vars(sys.modules["__main__"]))
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _end_after(program: Callable[[], object]) -> None:
    """Run a program and end as Python does, except that it takes no module apart: that took 0.4 CPU seconds."""
    code = None
    try:
        program()
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    import gc
    import importlib
    import pkgutil

    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # torch imports it when the first optimizer is made
    import torch.distributed.run
    import torchvision  # noqa: F401

    import kdcache
    import kdcache_kernels.cpu  # noqa: F401
    from kdcache_cli.app import main

    for found in pkgutil.walk_packages(kdcache.__path__, "kdcache."):
        importlib.import_module(found.name)
    gc.freeze()  # what is imported lives as long as the forks
    _serve(sys.argv[1])
    _end_after({"kdcache": main, "torchrun": torch.distributed.run.main, "python": _interpret}[sys.argv[0]])
