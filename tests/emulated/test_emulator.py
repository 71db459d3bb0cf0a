"""The emulation itself: right kernels run and wrong ones are caught, each for the right reason."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
import torch

from fastvit.emulated import build

PROGRAM = Path(__file__).with_name("emulator_test.cpp")
RIGHT = (
    "neighbours",
    "neighbours of a warp",
    "reuse",
    "copies",
    "first group",
    "shuffled",
    "product float16",
    "product bfloat16",
    "product transposed",
    "product tf32",
    "two launches",
    "complete",
    "banks of words",
    "banks of one word",
    "banks of every second word",
    "banks of pairs",
    "banks of every second pair",
    "banks of fours",
    "banks of every second four",
    "banks of parted lanes",
    "banks of reunited lanes",
    "banks of different loads",
    "banks of matrices",
    "wgmma float16",
    "wgmma bfloat16",
    "wgmma of copies",
    "wgmma in two groups",
    "wgmma transposed",
    "bulk copies",
    "last arrival",
    "roles",
)
WRONG = {
    "neighbours without barrier": ("without a barrier", "never written"),
    "neighbours of another warp": ("without a barrier", "never written"),
    "reuse without barrier": ("without a barrier",),
    "copies without wait": ("copy to it is in flight",),
    "copies without barrier": ("without a barrier", "never written", "in flight"),
    "copies without commit": ("copy to it is in flight",),
    "second group": ("copy to it is in flight",),
    "unfinished copy": ("ends with copies in flight",),
    "half a warp": ("a lane has ended", "a lane ends while others wait"),
    "different operations": ("different warp operations",),
    "barrier for some": ("after a thread has ended", "others wait at __syncthreads"),
    "written twice": ("second write to byte",),
    "written outside": ("outside every global buffer",),
    "input written": ("write to the input source",),
    "misaligned": ("misaligned read of 16 bytes",),
    "shared outside": ("out of range",),
    "never written": ("never written",),
    "incomplete": ("byte 28 of output was never written",),
    "scratch incomplete": ("byte 36 of scratch was never written",),
    "scratch never written": ("of scratch, which was never written",),
    "scratch partly written": ("read of byte 36 of scratch, which was never written",),
    "scratch of the same launch": ("of scratch in the launch that writes it",),
    "copy of scratch never written": ("of scratch, which was never written",),
    "scratch written by two launches": ("second write to byte",),
    "wgmma not published": ("without fence.proxy.async",),
    "wgmma copies not published": ("without fence.proxy.async",),
    "wgmma one thread not published": ("without fence.proxy.async",),
    "wgmma published late": ("without fence.proxy.async",),
    "wgmma published before the copy": ("without fence.proxy.async",),
    "wgmma without barrier": ("wrote without a barrier", "never written"),
    "wgmma without arrive": ("without warpgroup_arrive",),
    "wgmma arrives once": ("without warpgroup_arrive",),
    "wgmma without commit": ("ends with a wgmma that was not committed",),
    "wgmma without wait": ("ends with a wgmma in flight",),
    "wgmma waits for too little": ("wrong product",),
    "wgmma sums written": ("sums were written while",),
    "wgmma operand overwritten": ("while a wgmma reads it",),
    "wgmma operand copied over": ("while a wgmma reads it",),
    "wgmma operand overwritten after wait": ("while a wgmma reads it",),
    "wgmma operand overwritten by the last": ("while a wgmma reads it",),
    "wgmma different descriptors": ("different descriptors",),
    "wgmma misaligned": ("descriptor is misaligned",),
    "wgmma second row": ("first row of 1024 aligned bytes",),
    "wgmma leaves row": ("leaves a row",),
    "wgmma out of range": ("out of range",),
    "wgmma lanes apart": ("different warp operations",),
    "wgmma warps apart": ("warps of a warpgroup are at different operations",),
    "wgmma three warps": ("after a lane has ended", "deadlock"),
    "wgmma half a warpgroup": ("not whole warpgroups",),
    "wgmma transposed leaves row": ("leaves a row",),
    "wgmma transposed in another panel": ("wrong product",),
    "wgmma transposed out of range": ("out of range",),
    "bulk copies not waited for": ("never written", "without a wait for its mbarrier", "in flight"),
    "bulk copies waited for by one thread": ("never written", "without a wait for its mbarrier", "in flight"),
    "bulk copies over what is read": ("second write", "another thread read without a barrier", "in flight"),
    "bulk copies without the other's arrival": ("deadlock",),
    "bulk copies behind own arrivals alone": ("second write", "another thread read without a barrier", "in flight"),
    "mbarrier arrivals too many": ("more arrivals at an mbarrier",),
    "mbarrier full of the other parity": ("never written", "without a wait for its mbarrier", "in flight"),
    "mbarrier empty of the other parity": ("deadlock", "second write", "another thread read", "in flight"),
    "bulk copies of more than expected": ("too few bytes", "never written", "without a wait for its mbarrier"),
    "bulk copies of less than expected": ("deadlock",),
    "bulk copies to the own block alone": ("deadlock",),
    "bulk copies to no block": ("deadlock",),
    "bulk copies outside the cluster": ("outside the cluster",),
    "mbarrier without fence": ("without fence.mbarrier_init",),
    "mbarrier fenced before": ("without fence.mbarrier_init",),
    "mbarrier without barrier": ("not initialised", "initialised without a barrier"),
    "mbarrier with the block's barrier": ("not initialised", "initialised without a barrier"),
    "mbarrier not initialised": ("not initialised",),
    "mbarrier read": ("which is an mbarrier",),
    "mbarrier written": ("which is an mbarrier",),
    "mbarrier misaligned": ("misaligned",),
    "bulk copies sent before the end": (
        "a block ends while",
        "a block that has ended",
        "a block ends with a bulk copy",
    ),
    "bulk copies read behind the arrival": ("another thread read without a barrier", "in flight", "second write"),
    "bulk copies to a misaligned target": ("misaligned bulk copy",),
    "bulk copies of a misaligned source": ("misaligned read of 16 bytes",),
    "bulk copies of a misaligned size": ("misaligned bulk copy",),
    "bulk copies out of range": ("out of range",),
    "bulk copies over unpublished writes": ("written without fence.proxy.async",),
    "bulk copies without expectation": ("deadlock", "without a wait for its mbarrier"),
    "cluster barrier for some": ("barrier.cluster after a thread has ended", "others wait at barrier.cluster"),
    "registers that nobody releases": ("deadlock",),
    "more registers than are released": ("deadlock",),
    "registers for three warps": ("different operations", "different warp operations", "deadlock"),
    "registers of different counts": ("different operations", "a lane ends while others wait", "a lane has ended"),
    "registers released to more": ("released that a thread does not have",),
    "registers requested to fewer": ("requested that a thread has",),
    "roles of an arrival too few": ("deadlock",),
    "roles of an arrival too many": ("more arrivals", "without a barrier"),
    "roles without a wait for full": ("without a barrier", "never written"),
    "roles without a wait for empty": ("without a barrier", "wrong word"),
    "roles, full of the other parity": ("without a barrier", "never written"),
    "roles, empty of the other parity": ("deadlock",),
    "roles without the warp's barrier": ("without a barrier", "never written"),
    "last arrival without barrier": ("a block ends while", "a block that has ended"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the program prints: name → the rest of the line."""
    program = tmp_path_factory.mktemp("emulator") / "emulator_test"
    command = [str(build.compiler()), *build.FLAGS, f"-I{build.SOURCES}", str(PROGRAM), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    output = subprocess.run([program], check=True, capture_output=True, text=True, timeout=300).stdout
    lines = (line.partition("\t") for line in output.splitlines())
    return {name: rest for name, _, rest in lines}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_runs_under_every_schedule(results: dict[str, str], name: str) -> None:
    assert results[name] == ""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_caught(results: dict[str, str], name: str) -> None:
    assert any(reason in results[name] for reason in WRONG[name]), results[name] or "not caught"


def test_no_case_is_left_out(results: dict[str, str]) -> None:
    numbers = ("float16 ", "bfloat16 ", "round ")
    assert {name for name in results if not name.startswith(numbers)} == {*RIGHT, *WRONG}


def test_16_bit_numbers_are_pytorchs(results: dict[str, str]) -> None:
    checked = 0
    for name, rest in results.items():
        kind, _, raw = name.partition(" ")
        if kind in ("float16", "bfloat16"):
            dtype = torch.float16 if kind == "float16" else torch.bfloat16
            value = torch.tensor([int(raw)], dtype=torch.uint16).view(dtype).float()
            assert value.isnan().item() or _bits(value.item()) == int(rest, 16), name
        elif kind == "round":
            value = torch.tensor([int(raw)], dtype=torch.int32).view(torch.float32)
            half, bfloat16 = (int(word, 16) for word in rest.split())
            assert value.half().view(torch.uint16).item() == half, name
            assert value.bfloat16().view(torch.uint16).item() == bfloat16, name
        else:
            continue
        checked += 1
    assert checked > 30_000


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
