"""Runs programs in forks of a process that has imported them: that takes longer than all that a page's commands do.

preloaded.py SOCKET LOG listens for stand_in.py, until it is killed or who started it has ended; LOG gets a line of JSON
for each program.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch._dynamo  # what an optimizer imports with its first step
import torch.distributed.run

import fastvit.checkpoints
import fastvit.cli
import fastvit.training.input_speed  # noqa: F401
from fastvit.peers import import_peer, peer_missing

PROGRAMS: dict[str, Any] = {
    "fastvit": fastvit.cli.main,
    "torchrun": torch.distributed.run.main,
    "python": lambda arguments: fastvit.cli.main(arguments[arguments.index("fastvit.cli") + 1 :]),  # -u -m fastvit.cli
}


def listen(path: str, log: Path) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        server.settimeout(5)
        while os.getppid() == parent:
            try:
                client = server.accept()[0]
            except TimeoutError:
                continue
            if os.fork() == 0:
                server.close()
                os._exit(serve(client, log))
            client.close()


def serve(client: socket.socket, log: Path) -> int:
    """Run one program, as long as its client is there; tell it how the program ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    order = json.loads(client.makefile("rb").readline())
    with log.open("a") as file:
        file.write(json.dumps({name: order[name] for name in ("program", "given", "arguments")}) + "\n")
    process = os.fork()
    if process == 0:
        client.close()
        os._exit(run(streams, order))
    ended = os.pidfd_open(process)
    either: list[Any] = [client, ended]
    if ended not in select.select(either, [], [])[0]:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    client.sendall(bytes([code if code >= 0 else 128 - code]))
    return 0


def run(streams: list[int], order: dict[str, Any]) -> int:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(order["variables"])
    os.chdir(order["folder"])
    sys.argv = [order["program"], *order["arguments"]]
    try:
        return PROGRAMS[order["program"]](order["arguments"]) or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    if not peer_missing("timm"):
        import_peer("timm.data.mixup")
        import_peer("timm.optim")
    listen(sys.argv[1], Path(sys.argv[2]))
