"""A process that runs examples, one after another, as `python EXAMPLE OPTIONS` would; their imports are slow.

It reads jobs from stdin and answers each on stdout, both as a line of JSON. It is a file of its own since it prepares
what a script does not: torchvision beside a torch that its wheel was not made for.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from fastvit.backend import launch_counts, reset_launch_counts
from fastvit.peers import import_peer

EMBEDDINGS = ("patch_embed", "patch_embed_packed")


def run(path: str, source: str, options: list[str], missing: list[str]) -> dict[str, Any]:
    """Exit code, output and launches of an example whose text is `source`, where the packages `missing` are not."""
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in missing}
    sys.modules.update(dict.fromkeys([*hidden, *missing]))  # type: ignore[arg-type]
    sys.argv = [path, *options]
    sys.path.insert(0, str(Path(path).parent))
    reset_launch_counts()
    out, errors = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            exec(compile(source, path, "exec"), {"__name__": "__main__", "__file__": path, "__doc__": None})
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            errors.write("" if stop.code is None or isinstance(stop.code, int) else f"{stop.code}\n")
        except BaseException:
            code = 1
            traceback.print_exc()
    sys.path.remove(str(Path(path).parent))
    for name in missing:
        del sys.modules[name]
    sys.modules.update(hidden)
    launches = sum(count for (op, _), count in launch_counts().items() if op in EMBEDDINGS)
    return {"code": code, "out": out.getvalue(), "errors": errors.getvalue(), "launches": launches}


def main() -> None:
    with contextlib.suppress(ImportError):
        import_peer("torchvision")
    answers = sys.stdout
    for line in sys.stdin:
        answer = run(**json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
