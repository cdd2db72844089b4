"""Commands as processes of their own that need no import: one server imports everything once and forks.

    with ForkServer(folder) as server:
        subprocess.run(["kdcache", "train-student", ...], env=server.environment(os.environ))

The program `kdcache` in the server's folder hands its words, environment, working folder and standard streams to the
server. The fork runs the command line, and the program ends as the fork ends. SIGINT and SIGTERM reach the fork, and
SIGKILL of the program kills it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
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
        self.program = self._bin / "kdcache"

    def __enter__(self) -> ForkServer:
        self._bin.mkdir(parents=True)
        self.program.write_text(CLIENT.format(python=sys.executable, address=str(self._address)), encoding="utf-8")
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)
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
        """Return an environment in which `kdcache` is the forked one."""
        return {**of, "PATH": f"{self._bin}{os.pathsep}{of['PATH']}"}


def _serve(address: str) -> None:
    """Fork for every request; return in the fork, with its words as `sys.argv`."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            break
        client.close()
    words, folder, environment = _received(client)
    if process := os.fork():
        _watch(process, client)
    client.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # it was of the server's environment
    sys.argv = ["kdcache", *words]


def _reap(*_: object) -> None:
    """Wait for the watchers that have ended, so that their CPU time counts as the server's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _received(client: socket.socket) -> Any:
    """Read a request, and take the client's standard streams."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    with client.makefile("rb") as file:
        return json.loads(file.read(int.from_bytes(size, "big")))


def _watch(process: int, client: socket.socket) -> None:
    """Tell a client who its process is and how it ended, and end. Kill the process if the client is killed."""
    client.sendall(f"{process}\n".encode())
    ended = os.pidfd_open(process)
    if ended not in select.select([ended, client], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(BrokenPipeError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    import gc
    import importlib
    import pkgutil

    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch._dynamo  # noqa: F401 (torch imports it when the first optimizer is made)
    import torchvision  # noqa: F401

    import kdcache
    import kdcache_kernels.cpu  # noqa: F401
    from kdcache_cli.app import main

    for found in pkgutil.walk_packages(kdcache.__path__, "kdcache."):
        importlib.import_module(found.name)
    gc.freeze()  # what is imported lives as long as the forks
    _serve(sys.argv[1])
    main()
