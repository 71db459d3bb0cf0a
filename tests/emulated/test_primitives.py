"""Each primitive in the emulation does what plain arithmetic says, with the layouts of the PTX ISA stated once more."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastvit.emulated import build

LIBRARY = Path(__file__).with_name("primitives_library.cpp")
Array = NDArray[Any]
LANES = np.arange(32)


class Primitives:
    """The compiled kernels, by name."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.name.restype = library.run.restype = ctypes.c_char_p
        self.library = library
        self.numbers = {library.name(which).decode(): which for which in range(library.count())}

    def input(self, name: str, seed: int) -> Array:
        """Random bytes, uint8."""
        size = self.library.input_bytes(self.numbers[name])
        return _aligned(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))

    def run(self, name: str, data: Array, *, capability: int = 90, seed: int = 0) -> Array:
        """The output's bytes, uint8.

        Raises:
            RuntimeError: the emulation found a fault, or the device has no such primitive.
        """
        which = self.numbers[name]
        output = _aligned(np.full(self.library.output_bytes(which), 0xA5, dtype=np.uint8))
        addresses = (ctypes.c_void_p(array.ctypes.data) for array in (data, output))
        message = self.library.run(which, *addresses, capability, ctypes.c_uint64(seed))
        if message:
            raise RuntimeError(message.decode())
        return output


@pytest.fixture(scope="module")
def primitives(tmp_path_factory: pytest.TempPathFactory) -> Primitives:
    """The kernels, compiled by the host's compiler into a library of their own."""
    target = tmp_path_factory.mktemp("primitives") / "primitives.so"
    command = [str(build.compiler()), *build.FLAGS, f"-I{build.SOURCES}", "-shared", str(LIBRARY)]
    command += ["-x", "c++", str(build.SOURCES / "primitives.cu"), "-o", str(target)]
    subprocess.run(command, check=True, timeout=300)
    return Primitives(ctypes.CDLL(str(target)))


def _aligned(array: Array) -> Array:
    """A copy whose address 16 divides."""
    room = np.empty(array.size + 16, dtype=np.uint8)
    first = -room.ctypes.data % 16
    room[first : first + array.size] = array
    return room[first : first + array.size]


def _small(data: Array) -> Array:
    """The integers from -8 to 8 that the kernels make of bytes."""
    return (data.astype(np.float32) % 17 - 8).astype(np.float32)


def _lanes(data: Array) -> Array:
    return data.view(np.uint32).reshape(32, 4)


def ldmatrix(data: Array, *, transposed: bool) -> Array:
    """Four matrices of 8 rows; a lane gets two neighbours of a row of each."""
    matrices = data.view(np.uint16).reshape(32, 8)[(5 * LANES + 3) % 32].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    return np.ascontiguousarray(matrices.reshape(4, 32, 2).swapaxes(0, 1))


def mma_16(data: Array) -> Array:
    """A lane is (row or column of 8, pair of 4). A and B: 16 values of the reduction are halves of pairs of two."""
    values = _small(data).reshape(8, 4, 16)
    a = values[..., :8].reshape(8, 4, 2, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, 16)
    b = values[..., 8:12].reshape(8, 4, 2, 2).transpose(2, 1, 3, 0).reshape(16, 8)
    return _to_lanes(_from_lanes(values[..., 12:]) + a @ b)


def mma_tf32(data: Array) -> Array:
    """As above, but single values instead of pairs; whatever stands in the lower 13 bits changes nothing."""
    values = _small(data).reshape(8, 4, 16)
    a = values[..., :4].reshape(8, 4, 2, 2).transpose(3, 0, 2, 1).reshape(16, 8)
    b = values[..., 4:6].transpose(2, 1, 0).reshape(8, 8)
    return _to_lanes(_from_lanes(values[..., 6:10]) + a @ b)


def _from_lanes(sums: Array) -> Array:
    """[8, 4, 4] → [16, 8]: two rows, eight apart, of two neighbours."""
    return sums.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)


def _to_lanes(matrix: Array) -> Array:
    return np.ascontiguousarray(matrix.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3))


def round_to_tf32(data: Array) -> Array:
    """In float64: to multiples of the last place of 11 significant bits, ties away from zero."""
    words = _lanes(data).copy()
    words[:, 1] = words[:, 1] & 0xFFFFE000 | 0x1000
    words[:, 2] = words[:, 2] & 0xFFFFE000 | 0x0FFF
    words[:, 3] = _not_finite(words[:, 3])
    values = words.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = values.astype(np.float64)
        place = np.exp2(np.maximum(np.frexp(wide)[1], -125) - 11.0)
        rounded = np.copysign(np.floor(np.abs(wide) / place + 0.5) * place, wide).astype(np.float32)
    return np.where(np.isfinite(values), rounded.view(np.uint32), words & 0xFFFFE000).astype(np.uint32)


def _not_finite(words: Array) -> Array:
    """Infinite where the word is odd; nearly all others are NaN."""
    return (words | 0x7F800000) & np.where(words & 1, 0xFF800000, 0xFFFFFFFF).astype(np.uint32)


def copies(data: Array, *, size: int) -> Array:
    """Pieces that are not valid are zero; each lane reads what the lane seven further copied."""
    pieces = data[:512].reshape(-1, size)
    copied = np.where(data[512:, None] & 1, pieces, 0).astype(np.uint8).reshape(32, 16)
    return np.roll(copied, -7, axis=0)


def permute_bytes(data: Array) -> Array:
    """Each of the lower four nibbles of a selector names one of eight bytes by its lower three bits."""
    own = data.reshape(32, 16)
    swapped = np.concatenate([own[:, 4:8], own[:, :4]], axis=1)
    chosen = []
    for source, selector in ((own[:, :8], own[:, 8:10]), (swapped, own[:, 12:14])):
        nibbles = np.stack([selector & 7, selector >> 4 & 7], axis=-1).reshape(32, 4)
        chosen.append(np.take_along_axis(source, nibbles.astype(np.int64), axis=1))
    return np.concatenate(chosen, axis=1)


def shuffle(data: Array) -> Array:
    """Word i comes from the lane whose number differs in these bits."""
    return np.stack([_lanes(data)[LANES ^ mask, i] for i, mask in enumerate((1, 6, 16, 31))], axis=1)


def narrow(data: Array, *, dtype: torch.dtype) -> Array:
    """Four numbers in pairs and one by one, rounded as PyTorch does; a NaN is 0x7fff."""
    words = _lanes(data).copy()
    for i in (1, 2):
        words[:, i] = words[:, i] & 0x807FFFFF | ((words[:, i] >> 23 & 0xFF) % 48 + 100) << 23
    zeros = _lanes(data)[:, 2] % 24
    words[:, 2] = words[:, 2] >> zeros << zeros
    last = words[:, 3]
    edge = last & 0x80000000 | 0x477FE000 | np.where(last % 4 == 2, last & 0x1FFF, last & 0x1000)
    words[:, 3] = np.where(last % 4 < 2, _not_finite(last), edge)
    values = torch.from_numpy(words.view(np.float32))
    raw = values.to(dtype).view(torch.uint16).numpy()
    raw = np.where(values.isnan().numpy(), 0x7FFF, raw).astype(np.uint16)
    return np.concatenate([raw, raw], axis=1)


def widen(data: Array, *, dtype: torch.dtype) -> Array:
    """Eight numbers twice; a NaN is 0x7fffffff."""
    values = torch.from_numpy(data.copy()).view(dtype).float().reshape(32, 8).numpy()
    words = np.where(np.isnan(values), 0x7FFFFFFF, values.view(np.uint32)).astype(np.uint32)
    return np.concatenate([words, words], axis=1)


def wgmma(data: Array, *, transposed: bool = False) -> Array:
    """Rows are 4 warps of 2 halves of 8, columns 24 times 4 pairs; a thread is (warp, row of 8, pair)."""
    values = _small(data)
    panels = values[: 256 * 64].reshape(4, 64, 64)
    if transposed:
        panels = panels.swapaxes(1, 2)
    a, b = panels[0], panels[1:].reshape(192, 64)
    start = values[256 * 64 :].reshape(4, 8, 4, 24, 2, 2)
    products = (a @ b.T).reshape(4, 2, 8, 24, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    return np.ascontiguousarray(start + products)


def bulk_copies(data: Array) -> Array:
    """Each of two blocks has both halves of every part; each lane reads what the lane seven further would."""
    return np.tile(np.roll(data.reshape(6, 32, 16), -7, axis=1), (2, 1, 1))


def passed_on(data: Array) -> Array:
    """Each of three warpgroups has every part; each thread reads what the thread seven further would."""
    return np.tile(np.roll(data.reshape(5, 1, 128, 16), -7, axis=2), (1, 3, 1, 1))


EXPECTED: dict[str, Callable[[Array], Array]] = {
    "ldmatrix": lambda data: ldmatrix(data, transposed=False),
    "ldmatrix.trans": lambda data: ldmatrix(data, transposed=True),
    "mma float16": mma_16,
    "mma bfloat16": mma_16,
    "mma tf32": mma_tf32,
    "round to tf32": round_to_tf32,
    "cp.async 4": lambda data: copies(data, size=4),
    "cp.async 8": lambda data: copies(data, size=8),
    "cp.async 16": lambda data: copies(data, size=16),
    "permute bytes": permute_bytes,
    "shuffle": shuffle,
    "float32 to float16": lambda data: narrow(data, dtype=torch.float16),
    "float32 to bfloat16": lambda data: narrow(data, dtype=torch.bfloat16),
    "float16 to float32": lambda data: widen(data, dtype=torch.float16),
    "bfloat16 to float32": lambda data: widen(data, dtype=torch.bfloat16),
    "wgmma float16": wgmma,
    "wgmma bfloat16": wgmma,
    "wgmma transposed float16": lambda data: wgmma(data, transposed=True),
    "wgmma transposed bfloat16": lambda data: wgmma(data, transposed=True),
    "cp.async.bulk": bulk_copies,
    "setmaxnreg": passed_on,
}


def test_no_primitive_is_left_out(primitives: Primitives) -> None:
    assert list(primitives.numbers) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_primitive_is_what_arithmetic_says(primitives: Primitives, name: str) -> None:
    for seed in range(8):
        data = primitives.input(name, seed)
        expected = EXPECTED[name](data).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(primitives.run(name, data, seed=seed), expected, err_msg=f"seed {seed}")


@pytest.mark.parametrize(
    "name", [name for name in EXPECTED if name.startswith(("wgmma", "cp.async.bulk", "setmaxnreg"))]
)
@pytest.mark.parametrize("capability", [80, 100])
def test_a_primitive_is_refused_where_it_does_not_exist(primitives: Primitives, name: str, capability: int) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: not on this device"):
        primitives.run(name, primitives.input(name, 0), capability=capability)
