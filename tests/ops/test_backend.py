"""Which backend runs, who may say so, and what is said when it can't."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import fastvit
from fastvit import backend as backends
from fastvit import functional
from fastvit.backend import BACKENDS, launch_counts, reset_launch_counts, triton_is_interpreted, use_backend
from fastvit.validation import PatchEmbedCase, make_inputs
from fastvit.validation.runner import Candidate, backend_candidate, check_inputs


def run(device: str, **kwargs: object) -> torch.Tensor:
    return functional.patch_embed(
        torch.randn(1, 3, 4, 4, device=device), torch.randn(8, 3, 4, 4, device=device), **kwargs
    )


def test_every_backend_is_listed_with_a_reason(device: str) -> None:
    known = fastvit.available_backends(device)
    assert tuple(known) == BACKENDS
    assert known["reference"] == ""
    if device == "cpu":
        assert known["cpu"] == "" and known["cuda"]
        assert (known["triton"] == "") == triton_is_interpreted()
    assert "CPU only" in fastvit.available_backends("cuda")["cpu"]


def test_forced_backend_runs(backend: str, device: str) -> None:
    run(device, backend=backend)
    with use_backend(backend):
        run(device)
    assert launch_counts() == {("patch_embed", backend): 2}


def test_the_argument_wins_over_the_scope(backend: str, device: str) -> None:
    with use_backend("reference"):
        run(device, backend=backend)
        run(device)
    assert launch_counts() == {("patch_embed", backend): 1}


def test_scopes_nest_and_end_on_errors(device: str) -> None:
    with pytest.raises(KeyError):
        with use_backend("reference"):
            with use_backend(None):
                run(device)
            assert sum(launch_counts().values()) == 1
            raise KeyError
    run(device)
    assert sum(launch_counts().values()) == 2


def test_a_scope_belongs_to_its_thread(backend: str, device: str) -> None:
    """Two that overlap, each ending after the other began; compiled code too, which each thread reads anew."""
    torch._dynamo.reset()
    images, weight = torch.randn(1, 3, 4, 4, device=device), torch.randn(8, 3, 4, 4, device=device)
    compiled = torch.compile(lambda x: functional.patch_embed(x, weight), fullgraph=True, backend="eager")
    steps = [threading.Event() for _ in range(3)]
    seen: dict[str, list[int]] = {"first": [], "second": []}

    def count(thread: str) -> None:
        for call in (lambda: run(device), lambda: compiled(images)):
            reset_launch_counts()
            call()
            seen[thread].append(launch_counts().get(("patch_embed", backend), 0))

    def first() -> None:
        with use_backend(backend):
            count("first")
            steps[0].set()
            steps[1].wait(60)
            count("first")
        steps[2].set()

    thread = threading.Thread(target=first)
    thread.start()
    steps[0].wait(60)
    with use_backend("reference"):
        count("second")
        steps[1].set()
        steps[2].wait(60)
        count("second")
    thread.join()
    assert seen == {"first": [1] * 4, "second": [0] * 4}
    assert backends._forced() is None


def test_scopes_of_generators_end_in_any_order_and_thread(device: str) -> None:
    def scope(name: str) -> Iterator[None]:
        with use_backend(name):
            yield

    one, two = scope("reference"), scope("cpu")
    next(one), next(two)
    one.close()  # before the one inside it
    assert backends._forced() == "cpu"
    thread = threading.Thread(target=two.close)
    thread.start()
    thread.join()
    assert backends._forced() is None


def test_a_scope_inside_compiled_code(device: str) -> None:
    torch._dynamo.reset()
    images, weight = torch.randn(1, 3, 4, 4, device=device), torch.randn(8, 3, 4, 4, device=device)

    def inside(images: torch.Tensor) -> torch.Tensor:
        with use_backend("reference"):
            first = functional.patch_embed(images, weight)
        return first + functional.patch_embed(images, weight)

    torch.compile(inside, fullgraph=True, backend="eager")(images)
    assert sum(launch_counts().values()) == 1 and backends._forced() is None


def test_float64_goes_to_the_reference(device: str) -> None:
    out = functional.patch_embed(
        torch.randn(1, 3, 4, 4, device=device).double(), torch.randn(8, 3, 4, 4, device=device).double()
    )
    assert out.dtype == torch.float64 and launch_counts() == {}
    with pytest.raises(RuntimeError, match="float64"):
        run(device, dtype=torch.float64, backend="cpu" if device == "cpu" else "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["same", "masters"])
@pytest.mark.parametrize("images", ["uint8", "float32", "same"])
def test_pytorchs_own_path_is_as_exact_as_plain_pytorch(
    images: str, parameters: str, dtype: torch.dtype, device: str
) -> None:
    """A tuning table may choose it, so that it is held to the same bound as the others."""
    case = PatchEmbedCase("own", grid=(4, 4), images=images, parameters=parameters, normalise=True, width=96)
    forward = backend_candidate("reference", device).forward
    rows = check_inputs(
        Candidate("reference", torch.device(device), forward), "patch_embed", make_inputs(case, dtype, device)
    )
    assert len(rows) >= 5 and [row for row in rows if row.status != "passed"] == []


def test_a_backend_that_is_not_there_says_why(device: str) -> None:
    name = "cuda" if device == "cpu" else "emulated"
    with pytest.raises(RuntimeError, match=rf"backend: '{name}' can't run on device '{device}': .+"):
        run(device, backend=name)
    with use_backend(name), pytest.raises(RuntimeError, match=f"use_backend: '{name}' can't run"):
        run(device)


def test_an_unknown_backend_lists_the_known_ones(device: str) -> None:
    for force in (lambda: run(device, backend="tritn"), lambda: use_backend("tritn").__enter__()):
        known = "reference, cpu, native, triton, cuda, emulated"
        with pytest.raises(ValueError, match=f"unknown backend 'tritn'; known: {known}"):
            force()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "ran {}"),
        ("cpu", "ran {('patch_embed', 'cpu'): 1}"),
        ("nonsense", "ValueError FASTVIT_BACKEND: unknown backend 'nonsense'; known: reference"),
        ("cuda", "RuntimeError FASTVIT_BACKEND: 'cuda' can't run on device 'cpu'"),
        ("", f"ran {{('patch_embed', '{backends._automatic('cpu', 'patch_embed', '')}'): 1}}"),
    ],
)
def test_environment_variable(value: str, expected: str) -> None:
    program = """
import torch
from fastvit import backend as backends
from fastvit import functional
from fastvit.backend import launch_counts
try:
    functional.patch_embed(torch.randn(1, 3, 4, 4), torch.randn(8, 3, 4, 4))
    print("ran", launch_counts())
except (ValueError, RuntimeError) as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "FASTVIT_BACKEND": value, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert expected in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("compute", "shape", "rows", "suits"),
    [
        (torch.bfloat16, (768, 3, 16, 16), 256 * 196, True),
        (torch.float16, (768, 3, 16, 16), None, True),
        (torch.bfloat16, (768, 3, 16, 16), 196, False),  # small
        (torch.float32, (768, 3, 16, 16), 256 * 196, False),
        (torch.bfloat16, (768, 3, 14, 14), 256 * 196, False),  # rows of 28 bytes
        (torch.bfloat16, (63, 3, 16, 16), 2**20, False),
        (torch.bfloat16, (768,), 256 * 196, False),  # no product
    ],
)
def test_what_suits_triton_is_a_matter_of_the_shape_whatever_the_op(
    compute: torch.dtype, shape: tuple[int, ...], rows: int | None, suits: bool
) -> None:
    assert backends._suits_triton(("an op", "forward", torch.uint8, compute, compute, shape, False), rows) == suits
