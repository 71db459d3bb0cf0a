"""Stage limits: batches whose offsets pass 2^31 values, and every even patch from 2 to 32 and an odd one.

Forward and every gradient against float64, by the rule of `fastvit.validation.tolerance`, outputs poisoned with NaN
beforehand. The numbers are new ones each time: a case's name holds the seed of the run, and its numbers come from the
name, so that a failure can be repeated.
"""

from __future__ import annotations

import itertools
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastvit.benchmarks.campaign.backends import backends_of
from fastvit.benchmarks.campaign.output import Lines, passed_if, print_table, report
from fastvit.validation.cases import DTYPES, AddPositionCase, Case, Inputs, PatchEmbedCase, make_inputs
from fastvit.validation.report import SKIPPED, Report, Row
from fastvit.validation.runner import Candidate, Tensors, backend_candidate, check_case, check_inputs

PATCHES = (*range(2, 33, 2), 7)
THRESHOLD = 2**31  # values; what 32 bits can't count
EDGE = 2  # samples at either end of a large batch that are compared
MARGIN = 1.25  # of memory, for what the estimate leaves out
GIB = 2**30


@dataclass(frozen=True)
class Beyond:
    """A case at the ends of a batch so large that the offsets of the last samples in a tensor pass the threshold.

    `what` is the tensor: "input" (images, or tokens of add_position) or "result".
    """

    case: Case
    what: str

    def samples(self, threshold: int) -> int:
        """The batch: the last EDGE samples lie wholly beyond the threshold."""
        taken = self._input_values() if self.what == "input" else self._result_values()
        return max(2 * EDGE, -(-threshold // taken) + EDGE)

    def bytes_needed(self, batch: int) -> int:
        """An estimate of the memory: the batch and what it is put together from, tokens, their gradients."""
        is_raw = isinstance(self.case, PatchEmbedCase) and self.case.images == "uint8"
        inputs = batch * self._input_values() * (2 if is_raw else 2 * 4)
        return round(MARGIN * (inputs + batch * self._result_values() * 2 * 5))

    def _input_values(self) -> int:
        case = self.case
        if isinstance(case, AddPositionCase):
            return case.patches * case.width
        return case.channels * math.prod(case.grid) * math.prod(case.patch)

    def _result_values(self) -> int:
        case = self.case
        kept = case.keep if isinstance(case, PatchEmbedCase) and case.keep is not None else case.patches
        return (case.prefix + kept) * case.width


def limits(
    out: Path, device: str = "cuda", backends: Sequence[str] | None = None, patches: Sequence[int] = PATCHES,
    dtypes: Iterable[str] = ("bfloat16", "float16", "float32"), threshold: int = THRESHOLD,
) -> str:  # fmt: skip
    """The large batches; then all patches in both layouts, raw and float images. Default: all backends that run."""
    lines = Lines(out / "validate.jsonl")
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}, part of every case's name")
    candidates = [backend_candidate(name, device) for name in backends or backends_of(device)]
    whole = Report()
    checks = _check_beyond(candidates, threshold, seed), _check_patches(candidates, patches, dtypes, seed)
    for rows in itertools.chain(*checks):
        lines.write(row.to_json() for row in rows)
        whole = Report(whole.rows + tuple(rows))
        report(figure=whole.summary())
    print_table(whole.table)
    for (_, reason), count in whole.skip_reasons().items():
        print(f"skipped {count}: {reason}")
    print(whole.summary())
    return passed_if(whole.ok)


def _check_patches(
    candidates: Sequence[Candidate], patches: Sequence[int], dtypes: Iterable[str], seed: int
) -> Iterator[list[Row]]:
    for dtype, case in itertools.product(dtypes, list(patch_cases(patches, seed))):
        for candidate in candidates:
            _announce(candidate, case, dtype)
            yield check_case(candidate, case, dtype)


def _announce(candidate: Candidate, case: Case, dtype: str) -> None:
    """Where a kernel hangs, the last line of the log says which."""
    print(f"{candidate.name} {case.op} {dtype}: {case.name}", flush=True)


def patch_cases(patches: Sequence[int], seed: int) -> Iterator[PatchEmbedCase]:
    """A case for each patch, layout and kind of images, with all parameters."""
    for patch in patches:
        for layout in ("nchw", "channels_last"):
            for images in ("uint8", "same"):
                yield PatchEmbedCase(
                    f"patch {patch}, {layout}, images {images}, seed {seed}",
                    batch=3,
                    grid=(3, 5),
                    patch=(patch, patch),
                    width=256,
                    images=images,
                    layout=layout,
                    normalise=True,
                )


def beyond_cases(seed: int) -> list[Beyond]:
    """Real shapes: images at 224 in patches of 16."""

    def embed(
        name: str, width: int = 256, images: str = "uint8", layout: str = "nchw", keep: int | None = None
    ) -> Case:
        return PatchEmbedCase(
            f"{name}, seed {seed}", batch=2 * EDGE, grid=(14, 14), width=width, images=images, layout=layout, keep=keep,
            normalise=images == "uint8",
        )  # fmt: skip

    tokens = AddPositionCase(f"large batch, seed {seed}", batch=2 * EDGE, patches=196, width=1024)
    return [
        Beyond(embed("large batch of raw images"), "input"),
        Beyond(embed("large batch, tokens", width=1024), "result"),
        Beyond(embed("large batch, channels last", layout="channels_last"), "input"),
        Beyond(embed("large batch, masked", keep=49), "input"),
        Beyond(embed("large batch, image gradient", images="same"), "input"),
        Beyond(tokens, "result"),
    ]


def _check_beyond(candidates: Sequence[Candidate], threshold: int, seed: int) -> Iterator[list[Row]]:
    for beyond, candidate in itertools.product(beyond_cases(seed), candidates):
        case, batch = beyond.case, beyond.samples(threshold)
        _announce(candidate, case, "bfloat16")
        needed, free = beyond.bytes_needed(batch), _free_bytes(candidate.device)
        if needed > free:
            reason = f"needs {needed / GIB:.0f} GiB of memory, {free / GIB:.0f} GiB are free"
            where = str(candidate.device)
            yield [Row(candidate.name, case.op, "bfloat16", case.name, "all", SKIPPED, reason=reason, device=where)]
            continue
        inputs = make_inputs(case, DTYPES["bfloat16"], candidate.device)
        yield check_inputs(
            at_the_ends(candidate, case, batch), case.op, inputs, f"{case.name}, batch {batch}", "bfloat16"
        )


def at_the_ends(candidate: Candidate, case: Case, batch: int) -> Candidate:
    """The candidate, given a case's samples as the first and last of a batch of `batch`; the others are random."""

    def forward(op: str, inputs: Inputs, tensors: Tensors) -> Tensor:
        name = "images" if op == "patch_embed" else "tokens"
        ends = tensors[name]
        assert ends is not None
        keep = inputs.keep
        if keep is not None:
            others = torch.randint(case.patches, (batch - 2 * EDGE, keep.shape[1]), device=keep.device)
            keep = torch.cat([keep[:EDGE], others, keep[EDGE:]])
        large = torch.cat([ends[:EDGE], _random_like(ends, batch - 2 * EDGE), ends[EDGE:]])
        assert large.stride()[1:] == ends.stride()[1:]
        result = candidate.forward(op, replace(inputs, keep=keep), {**tensors, name: large})
        if not bool(result.isfinite().all()):
            raise RuntimeError("values between the ends of the batch were never written, or are wrong")
        return torch.cat([result[:EDGE], result[-EDGE:]])

    return replace(candidate, forward=forward)


def _random_like(tensor: Tensor, batch: int) -> Tensor:
    """[batch, ...] random numbers, laid out as the tensor."""
    is_last = tensor.dim() == 4 and not tensor.is_contiguous()
    layout = torch.channels_last if is_last else torch.contiguous_format
    found = torch.empty(batch, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device, memory_format=layout)
    return found.normal_() if found.is_floating_point() else found.random_(256)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
