"""`fastvit`, `torchrun` and `python` as the commands of a page find them: small runs on a processor, of the programs
that preloaded.py has imported.

stand_in.py PROGRAM ARGUMENTS… hands all it has over to the process that listens at $STAND_IN_SOCKET, and ends as the
program ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys

PORT = "$STAND_IN_PORT"  # a free one

# In the place of the page's value, where it gives one.
SMALLER = {
    "--nproc-per-node": "2",
    "--rdzv-endpoint": f"localhost:{PORT}",
    "--model": "vit_digits",
    "--batch-size": "4",
    "--accumulate-steps": "2",
    "--warmup-epochs": "0.5",
    "--checkpoint-blocks": "3",
    "--save-steps": "2",
    "--seconds": "1",
}
RENAMED = {"runs/full/epoch-0000-step-001000": "runs/full/epoch-0000-step-000002"}
# Compiling takes longer than all the rest; it has tests of its own.
LEFT_OUT = {"--compile"}
# Behind the page's own: of an option that is given twice, the last one counts.
ADDED = {
    "train": "--model vit_digits --image-size 16 --epochs 1 --workers 0 --threads 1 --device cpu --no-tensorboard",
    "bench": "--image-size 16 --workers 0 --threads 1 --device cpu",
}


def smaller(arguments: list[str]) -> list[str]:
    """Those that run in a moment, of the page's."""
    found: list[str] = []
    for argument in arguments:
        if argument not in LEFT_OUT:
            given = RENAMED.get(argument, argument)
            found.append(os.path.expandvars(SMALLER.get(found[-1], given) if found else given))
    for command, options in ADDED.items():
        if command in arguments:
            found += options.split()
    return found


def main(program: str, arguments: list[str]) -> int:
    small = arguments if program == "python" else smaller(arguments)
    order: dict[str, object] = {"program": program, "given": arguments, "arguments": small}
    order |= {"folder": os.getcwd(), "variables": {**os.environ}}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["STAND_IN_SOCKET"])
        socket.send_fds(server, [b"!"], [0, 1, 2])
        server.sendall(json.dumps(order).encode() + b"\n")
        code = server.recv(1)
    return code[0] if code else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
