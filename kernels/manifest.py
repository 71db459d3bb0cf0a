"""Every specialisation of every kernel, as data. A launcher can run nothing else.

An entry fixes what Triton compiles for: element types, constants, warps, stages, and whether pointers are 16-byte
aligned. Integers are never specialised on. ``compile_check`` compiles all entries for all targets; the functions
below are how launchers look an entry up, and fail where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

NAMES = {
    torch.uint8: "u8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
}
HALF = ("bf16", "fp16")
IMAGES = ("u8", "bf16", "fp16", "fp32")
MINIMUM_WAVE = 132  # programs that keep an H200 busy; a large tile is only worth it with at least as many


@dataclass(frozen=True)
class Entry:
    """One compilation of one kernel."""

    kernel: str  # what the tables call it
    module: str  # in fastvit.kernels
    function: str  # in the module
    key: tuple[str, ...]
    pointers: tuple[tuple[str, str], ...]  # parameter, element type
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    compute: str = ""  # dtype of the operands of its products; "" where there are none

    @property
    def constants_by_name(self) -> dict[str, Any]:
        return dict(self.constants)

    def constant(self, name: str) -> Any:
        return self.constants_by_name[name]

    @property
    def name(self) -> str:
        return " ".join((self.kernel, *self.key))

    @property
    def tile(self) -> tuple[int, ...]:
        constants = self.constants_by_name
        return tuple(constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in constants)


@dataclass(frozen=True)
class Variant:
    """How a patch is walked through; see layout.py."""

    run: int
    rows: int
    align: int  # elements that divide every stride
    width_align: int  # elements that divide D
    masked: bool


VARIANTS = {
    "wide": Variant(run=16, rows=4, align=16, width_align=16, masked=False),  # patches 16, 32, ...
    "narrow": Variant(run=8, rows=8, align=8, width_align=16, masked=False),  # patch 8
    "masked": Variant(run=16, rows=4, align=2, width_align=16, masked=True),  # patch 14, and other even ones
    "generic": Variant(run=8, rows=4, align=1, width_align=1, masked=True),  # any patch, stride, width and address
}


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    warps: int
    stages: int


FORWARD_TILES = {
    "large": Tile(128, 256, 8, 3),
    "medium": Tile(128, 128, 8, 3),
    "small": Tile(64, 128, 4, 3),
    "tf32": Tile(128, 128, 8, 2),
    "generic": Tile(64, 64, 4, 3),
}

_ENTRIES: dict[tuple[str, ...], Entry] = {}


def _add(entry: Entry) -> None:
    place = (entry.kernel, *entry.key)
    assert place not in _ENTRIES, place
    _ENTRIES[place] = entry


def _find(kernel: str, *key: str) -> Entry:
    name = (kernel, *key)
    return _ENTRIES[name]


def entries() -> tuple[Entry, ...]:
    """The manifest."""
    return tuple(_ENTRIES.values())


def _step(variant: Variant) -> tuple[tuple[str, Any], ...]:
    return (("RUN", variant.run), ("ALIGN", variant.align), ("WIDTH_ALIGN", variant.width_align))


# patch_embed, forward


def _add_forward(
    variant_name: str, tile_name: str, image: str, compute: str, out: str, precision: str = "ieee"
) -> None:
    variant, tile = VARIANTS[variant_name], FORWARD_TILES[tile_name]
    _add(
        Entry(
            kernel="patch_embed_forward",
            module="patch_embed_forward",
            function="unaligned" if variant_name == "generic" else "aligned",
            key=(variant_name, tile_name, image, compute, out, precision),
            pointers=(
                ("images_ptr", image),
                ("weight_ptr", compute),
                ("table_ptr", "fp32"),
                ("normaliser_ptr", "fp32"),
                ("keep_ptr", "i64"),
                ("tokens_ptr", out),
            ),
            constants=(
                *_step(variant),
                ("ROWS", variant.rows),
                ("MASKED", variant.masked),
                ("PRECISION", precision),
                ("BLOCK_M", tile.m),
                ("BLOCK_N", tile.n),
                ("GROUP_M", 8),
            ),
            num_warps=tile.warps,
            num_stages=tile.stages,
            compute=compute,
        )
    )


def _add_all_forward() -> None:
    for compute in HALF:
        for image in ("u8", compute, "fp32"):
            for out in (compute, "fp32"):
                _add_forward("wide", "medium", image, compute, out)
    for image in ("u8", "bf16"):  # fp32 images at this tile take more registers than there are on sm_100
        _add_forward("wide", "large", image, "bf16", "bf16")
    for image in ("u8", "bf16", "fp32"):
        _add_forward("wide", "small", image, "bf16", "bf16")
        for out in ("bf16", "fp32"):
            _add_forward("narrow", "medium", image, "bf16", out)
            _add_forward("masked", "medium", image, "bf16", out)
    # uint8 images go to the generic kernels here: Triton would copy them 4 bytes at a time.
    _add_forward("wide", "tf32", "fp32", "fp32", "fp32", "tf32")
    for image in IMAGES:
        for compute, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
            _add_forward("generic", "generic", image, compute, "fp32", precision)


def forward_tiles(
    variant: str, image: torch.dtype, compute: torch.dtype, out: torch.dtype, precision: str, width: int
) -> dict[str, Entry]:
    """The entries between which a forward GEMM of width D can choose, by the name of their tile, largest first."""
    types = (NAMES[image], NAMES[compute], NAMES[out], precision)
    found = {
        name: _ENTRIES.get(("patch_embed_forward", variant, name, *types))
        for name, tile in FORWARD_TILES.items()
        if name != "large" or width % tile.n == 0
    }
    return {name: entry for name, entry in found.items() if entry is not None}


def forward(
    variant: str,
    image: torch.dtype,
    compute: torch.dtype,
    out: torch.dtype,
    precision: str,
    rows: int,
    width: int,
    tile: str | None = None,
) -> Entry | None:
    """The entry for a forward GEMM of [rows, D = width]; None where the variant has none.

    That of the preferred `tile` where the variant has it, else one chosen by shape alone.
    """
    tiles = forward_tiles(variant, image, compute, out, precision, width)
    if tile in tiles:
        return tiles[tile]
    smallest = tiles.get("small")
    for entry in tiles.values():
        programs = -(-rows // entry.constant("BLOCK_M")) * -(-width // entry.constant("BLOCK_N"))
        if programs >= MINIMUM_WAVE or smallest is None or entry is smallest:
            return entry
    return None


# patch_embed, backward


def _add_weight_gradient(variant_name: str, image: str, compute: str, precision: str = "ieee") -> None:
    variant = VARIANTS[variant_name]
    generic = variant_name == "generic"
    # Where pixels need no conversion ptxas aims for 128 registers on sm_80, and 64 rows a step would spill.
    blocks = (16, 64, 64) if generic else (32 if image == compute else 64, 128, 128)
    _add(
        Entry(
            kernel="patch_embed_weight_gradient",
            module="patch_embed_backward",
            function="weight_gradient_unaligned" if generic else "weight_gradient_aligned",
            key=(variant_name, image, compute, precision),
            pointers=(
                ("images_ptr", image),
                ("grad_ptr", compute),
                ("normaliser_ptr", "fp32"),
                ("keep_ptr", "i64"),
                ("parts_ptr", "fp32"),
            ),
            constants=(
                *_step(variant),
                ("MASKED", variant.masked),
                ("PRECISION", precision),
                *zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True),
            ),
            num_warps=4 if generic else 8,
            num_stages=4 if image == compute and not generic else 3,
            compute=compute,
        )
    )


def _add_image_gradient(variant_name: str, image: str, compute: str, precision: str = "ieee") -> None:
    variant = VARIANTS[variant_name]
    generic = variant_name == "generic"
    blocks = (64, 32, 64) if generic else (128, 64, 128)
    _add(
        Entry(
            kernel="patch_embed_image_gradient",
            module="patch_embed_backward",
            function="image_gradient_unaligned" if generic else "image_gradient_aligned",
            key=(variant_name, image, compute, precision),
            pointers=_pointers(grad=compute, weight=compute, normaliser="fp32", images=image),
            constants=(
                *_step(variant),
                ("PRECISION", precision),
                *zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True),
            ),
            num_warps=4 if generic else 8,
            num_stages=3,
            compute=compute,
        )
    )


def _add_all_backward() -> None:
    for compute in HALF:
        for image in ("u8", compute, "fp32"):
            _add_weight_gradient("wide", image, compute)
        for image in (compute, "fp32"):
            _add_image_gradient("wide", image, compute)
    for image in ("u8", "bf16", "fp32"):
        _add_weight_gradient("narrow", image, "bf16")
        _add_weight_gradient("masked", image, "bf16")
    for compute, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        for image in IMAGES:
            _add_weight_gradient("generic", image, compute, precision)
        _add_image_gradient("generic", "fp32", compute, precision)
    for dtype in ("fp32", *HALF):
        _add(
            Entry(
                kernel="reduce_weight_gradient",
                module="patch_embed_backward",
                function="reduce_weight_gradient",
                key=(dtype, "run16"),
                pointers=_pointers(parts="fp32", constants="fp32", bias_gradient="fp32", gradient=dtype),
                constants=(("RUN", 16), ("BLOCK_D", 16), ("BLOCK_E", 256)),
                num_warps=4,
                num_stages=2,
            )
        )
        _add(
            Entry(
                kernel="reduce_weight_gradient",
                module="patch_embed_backward",
                function="reduce_weight_gradient",
                key=(dtype, "run8"),
                pointers=_pointers(parts="fp32", constants="fp32", bias_gradient="fp32", gradient=dtype),
                constants=(("RUN", 8), ("BLOCK_D", 16), ("BLOCK_E", 256)),
                num_warps=4,
                num_stages=2,
            )
        )


def weight_gradient(variant: str, image: torch.dtype, compute: torch.dtype, precision: str) -> Entry | None:
    return _ENTRIES.get(("patch_embed_weight_gradient", variant, NAMES[image], NAMES[compute], precision))


def image_gradient(variant: str, image: torch.dtype, compute: torch.dtype, precision: str) -> Entry | None:
    return _ENTRIES.get(("patch_embed_image_gradient", variant, NAMES[image], NAMES[compute], precision))


def reduce_weight_gradient(dtype: torch.dtype, run: int) -> Entry:
    return _find("reduce_weight_gradient", NAMES[dtype], f"run{run}")


# the small kernels


def _pointers(**types: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{name}_ptr", element) for name, element in types.items())


_ROUNDINGS = (
    *((dtype, dtype) for dtype in ("fp32", *HALF)),
    *(("fp32", h) for h in HALF),
    *((h, "fp32") for h in HALF),
)


def _add_small() -> None:
    for source, compute in _ROUNDINGS:
        if source != "fp32" and compute == "fp32":
            continue  # the launcher widens a 16-bit weight for fp32 compute
        for run in (8, 16):
            _add(
                Entry(
                    kernel="prepare_weight",
                    module="prepare_weight",
                    function="prepare_weight",
                    key=(source, compute, f"run{run}"),
                    pointers=_pointers(
                        weight=source,
                        bias="fp32",
                        constants="fp32",
                        prepared=compute,
                        normaliser="fp32",
                        bias_out="fp32",
                    ),
                    constants=(("RUN", run), ("BLOCK_D", 16), ("BLOCK_K", 128)),
                    num_warps=4,
                    num_stages=2,
                )
            )
    _add(
        Entry(
            kernel="prepare_table",
            module="prepare_weight",
            function="prepare_table",
            key=(),
            pointers=_pointers(bias="fp32", positions="fp32", prefix="fp32", table="fp32"),
            constants=(("BLOCK_ROWS", 8), ("BLOCK_D", 128)),
            num_warps=4,
            num_stages=1,
        )
    )
    for is_aligned in (True, False):
        suffix, align = ("aligned", 16) if is_aligned else ("unaligned", 1)
        for dtype in ("fp32", *HALF):
            _add(
                Entry(
                    kernel="sum_rows",
                    module="row_sums",
                    function=f"sum_rows_{suffix}",
                    key=(suffix, dtype),
                    pointers=_pointers(matrix=dtype, sums="fp32"),
                    constants=(("ALIGN", align), ("BLOCK_ROWS", 8), ("BLOCK_COLUMNS", 256)),
                    num_warps=4,
                    num_stages=2,
                )
            )
        for source, out in _ROUNDINGS:
            if out == source or out == "fp32":
                _add(
                    Entry(
                        kernel="sum_segments",
                        module="row_sums",
                        function=f"sum_segments_{suffix}",
                        key=(suffix, source, out),
                        pointers=_pointers(grad=source, order="i64", starts="i64", sums=out),
                        constants=(("ALIGN", align), ("BLOCK_ROWS", 4), ("BLOCK_D", 256)),
                        num_warps=4,
                        num_stages=2,
                    )
                )
            _add(
                Entry(
                    kernel="add_position",
                    module="add_position",
                    function=suffix,
                    key=(suffix, source, out),
                    pointers=_pointers(tokens=source, table="fp32", out=out),
                    constants=(
                        ("ALIGN", align),
                        ("CONTIGUOUS", is_aligned),
                        ("BLOCK_ROWS", 8),
                        ("BLOCK_D", 256),
                    ),
                    num_warps=4,
                    num_stages=1,
                )
            )


def prepare_weight(source: torch.dtype, compute: torch.dtype, run: int) -> Entry:
    return _find("prepare_weight", NAMES[source], NAMES[compute], f"run{run}")


def prepare_table() -> Entry:
    return _find("prepare_table")


def sum_rows(dtype: torch.dtype, is_aligned: bool) -> Entry:
    return _find("sum_rows", "aligned" if is_aligned else "unaligned", NAMES[dtype])


def sum_segments(source: torch.dtype, out: torch.dtype, is_aligned: bool) -> Entry:
    return _find("sum_segments", "aligned" if is_aligned else "unaligned", NAMES[source], NAMES[out])


def can_round(source: torch.dtype, out: torch.dtype) -> bool:
    """Whether add_position has entries from source to out."""
    return (NAMES.get(source), NAMES.get(out)) in _ROUNDINGS


def add_position(source: torch.dtype, out: torch.dtype, is_aligned: bool) -> Entry:
    return _find("add_position", "aligned" if is_aligned else "unaligned", NAMES[source], NAMES[out])


_add_all_forward()
_add_all_backward()
_add_small()
