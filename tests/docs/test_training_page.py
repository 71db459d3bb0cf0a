"""docs/training.md: every shell command on it runs, as stand_in.py makes it small; its table is what is counted."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastvit
from tests.docs import memory_table
from tests.libraries import needs
from tests.training.runs import free_port
from tests.two_processes import needs_gloo

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = ("fastvit", "torchrun")
MACHINES = 2
# By the output that is in a block: what is there behind it, and what it has said.
EXPECTED = {
    "runs/one": (["last.pt", "best.pt", "metrics.jsonl"], "this run is complete"),
    "runs/ddp": (["last.pt", "best.pt", "metrics.jsonl"], "test accuracy"),
    "runs/full": (["epoch-0000-step-000002", "epoch-0001", "metrics.jsonl"], "test accuracy"),
    "runs/alone": (["last.pt", "best.pt", "metrics.jsonl"], "going on after step 2 of epoch 1"),
    "runs/two": (["epoch-0001", "metrics.jsonl"], "test accuracy"),
    "runs/slurm": (["epoch-0001", "metrics.jsonl"], "test accuracy"),
    "vit.safetensors": ([], "Wrote vit.safetensors: timm"),
    "runs/shards": (["last.pt", "best.pt", "metrics.jsonl"], "39 images of 3 classes, 9 to test on"),
    "runs/sizes": (["last.pt", "best.pt", "metrics.jsonl"], "test accuracy"),
    "bench input": ([], "The loader gives"),
    "runs/deit": (["last.pt", "best.pt", "metrics.jsonl"], "of the average"),
}
# Programs of a page's commands that are no FastViT's, as scripts.
SLURM = {
    "scontrol": "echo node1; echo node2",
    "srun": 'for machine in 1 2; do "$@" & jobs="$jobs $!"; done; for job in $jobs; do wait "$job" || exit 1; done',
}
SLURM_VARIABLES = {
    "SLURM_JOB_ID": "7",
    "SLURM_NNODES": str(MACHINES),
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_JOB_NODELIST": "node[1-2]",
}


def shell_blocks() -> list[str]:
    return [source for language, source in BLOCKS if language == "sh"]


def expected_of(block: str) -> str:
    """Its key in EXPECTED."""
    outputs = re.findall(r"--output (\S+)", block)
    return outputs[-1] if outputs else [key for key in EXPECTED if key in block][-1]


def commands(block: str) -> list[list[str]]:
    """Program and arguments of each command that the page wants to be tried."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = words[1:] if words[:1] == ["srun"] else words
        if words[:1] and words[0] in PROGRAMS:
            found.append(words)
    return found


class Shop:
    """A folder with images in which the page's blocks are run, and what came of each."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.folder, self.log = folder, folder / "log.jsonl"
        self.ran: list[tuple[str, list[str], float]] = []  # block, all that was said, seconds
        self.called: dict[str, list[list[str]]] = {}
        self.environment = self._environment(socket)
        write_photos(folder / "photos")

    def _environment(self, socket: Path) -> dict[str, str]:
        programs = self.folder / "bin"
        programs.mkdir()
        ours = {
            name: f'exec {sys.executable} -S {ROOT}/tests/docs/stand_in.py {name} "$@"'
            for name in (*PROGRAMS, "python")
        }
        for name, script in {**ours, **SLURM}.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        return {
            **os.environ,
            **SLURM_VARIABLES,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON_EXEC": str(programs / "python"),  # what torchrun starts
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "STAND_IN_SOCKET": str(socket),
        }

    def run(self, language: str, block: str) -> None:
        before = len(self._log())
        started = time.perf_counter()
        if language == "python":
            command = [sys.executable, "-c", block]
        else:
            command = ["bash", "-e", "-u", "-c", block]
        said = self._at_once(command, machines=MACHINES if "--rdzv-endpoint node1" in block else 1)
        if "--resume auto" in block and expected_of(block) == "runs/one":
            said += self._at_once(command)
        self.ran.append((block, said, time.perf_counter() - started))
        self.called[block] = [[line["program"], *line["given"]] for line in self._log()[before:]]

    def _at_once(self, command: list[str], machines: int = 1) -> list[str]:
        variables = {**self.environment, "STAND_IN_PORT": str(free_port())}
        with ExitStack() as stack:
            started = [
                stack.enter_context(
                    subprocess.Popen(
                        command,
                        cwd=self.folder,
                        env=variables,
                        text=True,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                    )
                )
                for _ in range(machines)
            ]
            for process in started:
                stack.callback(process.kill)
            said = [process.communicate(timeout=120)[0] for process in started]
        for process, text in zip(started, said, strict=True):
            assert process.returncode == 0, f"{command[-1]}\n{text}"
        return said

    def _log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


def write_photos(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "hen"):
        (folder / name).mkdir(parents=True)
        for index in range(16):
            pixels = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """All blocks of the page have been run, in its order."""
    folder = tmp_path_factory.mktemp("page")
    with tempfile.TemporaryDirectory() as short:  # a socket's path may have 107 bytes
        socket = Path(short) / "socket"
        found = Shop(folder, socket)
        arguments = [sys.executable, "-m", "tests.docs.preloaded", str(socket), str(found.log)]
        with subprocess.Popen(arguments, cwd=ROOT, env=found.environment) as server:
            try:
                while not socket.exists():
                    assert server.poll() is None, "it has ended"
                    time.sleep(0.05)
                for language, block in BLOCKS:
                    found.run(language, block)
                yield found
            finally:
                server.kill()


def test_every_block_is_expected() -> None:
    assert sorted(map(expected_of, shell_blocks())) == sorted(EXPECTED)


@needs_gloo
@needs("timm")
class TestCommands:
    def test_every_command_was_run(self, shop: Shop) -> None:
        for block in shell_blocks():
            wanted = commands(block)
            assert wanted, f"nothing to run: {block}"
            # A shell has put values into the page's variables.
            patterns = [[re.sub(r"\\\$\w+", ".+", re.escape(word)) for word in words] for words in wanted]
            for words, pattern in zip(wanted, patterns, strict=True):
                assert any(
                    len(words) == len(called) and all(map(re.fullmatch, pattern, called))
                    for called in shop.called[block]
                ), words

    @pytest.mark.parametrize("block", shell_blocks(), ids=expected_of)
    def test_it_does_what_the_page_says(self, shop: Shop, block: str) -> None:
        key = expected_of(block)
        files, words = EXPECTED[key]
        said = next("\n".join(said) for ran, said, _ in shop.ran if ran == block)
        assert words in said, said
        # Between machines torchrun settles on a free port that another program may take first; then it starts again.
        assert "error: " not in said or "--nnodes" in block, said
        assert {*files} <= {path.name for path in (shop.folder / key).glob("*")}

    def test_what_is_read_afterwards(self, shop: Shop) -> None:
        assert "3 classes" in "\n".join(next(said for block, said, _ in shop.ran if "inspect" in block))
        model = fastvit.load_pretrained(shop.folder / "runs/full/epoch-0001")
        same = fastvit.load_pretrained(shop.folder / "vit.safetensors")
        assert all(value.equal(same.state_dict()[name]) for name, value in model.state_dict().items())
        assert (shop.folder / "shards/classes.txt").read_text().split() == ["cat", "dog", "hen"]
        assert not list(shop.folder.glob("runs/*/.partial-*"))


def test_the_table_is_what_is_counted() -> None:
    begin, end = memory_table.MARKS
    assert TEXT.partition(begin)[2].partition(end)[0] == memory_table.table()


def test_the_numbers_in_the_text_are_counted() -> None:
    giant = memory_table.counted(memory_table.MODELS["ViT-g/14"], 1)
    assert f"2 bytes a parameter, {giant.parameters / 2 / 1e9:.1f} GB for ViT-g/14" in TEXT
    assert giant.held == 4 * giant.parameters and "A parameter takes 16 bytes" in TEXT
