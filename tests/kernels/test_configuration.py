"""The launchers take the tile and the split they are told, by a table or by force, and stay right with any."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastvit import functional, tuning
from fastvit.tuning import FORWARD, TRAINING, Choice, Configuration, Problem, Table

U8, BF16, FP32 = torch.uint8, torch.bfloat16, torch.float32


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[int, ...]]]:
    """Entries and grids of the GEMMs that are launched."""
    from fastvit.kernels import launch

    seen: list[tuple[Any, tuple[int, ...]]] = []
    run = launch.launch

    def spy(entry: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if entry.compute:
            seen.append((entry, grid))
        run(entry, grid, **arguments)

    monkeypatch.setattr(launch, "launch", spy)
    return seen


def tiles(launched: list[tuple[Any, tuple[int, ...]]]) -> list[str]:
    return [entry.key[1] for entry, _ in launched if entry.kernel == "patch_embed_forward"]


def splits(launched: list[tuple[Any, tuple[int, ...]]]) -> list[int]:
    return [grid[1] for entry, grid in launched if entry.kernel == "patch_embed_weight_gradient"]


@pytest.mark.parametrize("tile", ["large", "medium", "small"])
def test_a_forced_tile_is_taken_and_right(check: Callable, launched: list, tile: str) -> None:
    with tuning.forced_configuration(tile=tile):
        check(width=256, patch=(4, 16))
    assert tiles(launched) == [tile]


@pytest.mark.parametrize(("tile", "changes"), [("large", {"width": 192}), ("small", {"compute": FP32, "image": FP32})])
def test_a_tile_that_does_not_fit_leaves_the_rule(
    check: Callable, launched: list, tile: str, changes: dict[str, Any]
) -> None:
    check(**changes)
    with tuning.forced_configuration(tile=tile):
        check(**changes)
    assert tiles(launched)[0] == tiles(launched)[1] != tile


@pytest.mark.parametrize("width", [16, 17])
def test_forced_programs_set_the_split_and_are_right(check: Callable, launched: list, width: int) -> None:
    for programs in (1, 2, 4, None):
        with tuning.forced_configuration(programs=programs):
            check(batch=40, grid=(3, 5), patch=(4, 16), width=width, image=BF16)
    found = splits(launched)
    assert found[:2] == [1, 2] and found == sorted(found) and found[3] > 2


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("image", [U8, BF16, FP32])
def test_a_forced_tile_of_the_weight_gradient_is_right(
    check: Callable, launched: list, image: torch.dtype, keep: int | None
) -> None:
    """The large one where there is one, with more rows and columns than a tile of it has."""
    with tuning.forced_configuration(weight_tile="large"):
        check(batch=20, grid=(3, 5), patch=(16, 16), width=144, image=image, keep=keep)
    (entry,) = (entry for entry, _ in launched if entry.kernel == "patch_embed_weight_gradient")
    assert entry.key[1] == ("medium" if image == FP32 else "large") and entry.key[-1] == ("keep" if keep else "")


def test_the_tiles_to_choose_from(make: Callable) -> None:
    from fastvit.kernels.patch_embed import forward_tiles

    def of(compute: torch.dtype, out: torch.dtype, **changes: Any) -> tuple[str, ...]:
        inputs = make(**changes)
        return forward_tiles(inputs["images"], inputs["weight"], compute, out)

    assert of(BF16, BF16, width=256) == ("large", "medium", "small")
    assert of(BF16, BF16, width=192) == ("medium", "small")
    assert of(BF16, FP32, width=256) == ("medium",)
    assert of(BF16, BF16, patch=(14, 14)) == ("medium",)
    assert of(FP32, FP32) == of(BF16, BF16, width=63) == of(BF16, BF16, layout="cropped") == ("generic",)


def test_launchers_follow_the_table(
    use: Callable, device: str, launched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tile of the forward entry also in training; the programs of the training entry; by batch."""
    from fastvit.kernels import patch_embed

    told, run = [], patch_embed._weight_gradient
    monkeypatch.setattr(patch_embed, "_weight_gradient", lambda *a: (told.append(a[-1]), run(*a))[1])
    where = torch.empty(0, device=device).device

    def choice(tile: str | None, programs: int | None = None) -> Choice:
        return Choice("triton", {"triton": 1.0, "reference": 2.0}, Configuration(tile, programs))

    served = Problem("patch_embed", FORWARD, U8, BF16, BF16, (256, 3, 16, 16), False)
    trained = served._replace(mode=TRAINING)
    use(
        Table(
            tuning.device_name(where),
            tuning.current_versions(),
            {
                served: {2: choice("large"), 64: choice("medium")},
                trained: {2: choice("small", 1), 64: choice("small", 2)},
            },
        )
    )
    weight = torch.randn(256, 3, 16, 16, device=device).bfloat16().requires_grad_()
    prefix = torch.randn(1, 256, device=device).bfloat16()
    for batch in (1, 32):
        images = torch.randint(256, (batch, 3, 16, 32), dtype=torch.uint8, device=device)
        loss = functional.patch_embed(images, weight, prefix=prefix).float().square().sum()
        thread = threading.Thread(target=loss.backward)  # as autograd may
        thread.start()
        thread.join()
    assert tiles(launched) == ["large", "medium"]
    assert weight.grad is not None and weight.grad.isfinite().all()
    assert [configured.programs for configured in told] == [1, 2]

    launched.clear()
    with torch.no_grad(), tuning.forced_configuration("small"):
        functional.patch_embed(images, weight, prefix=prefix, backend="triton")
    assert tiles(launched) == ["small"]


def packed_step(device: str, images: int) -> torch.Tensor:
    """The weight's gradient of a training step on so many images of two patches."""
    weight = torch.ones(256, 3, 16, 16, device=device).bfloat16().requires_grad_()
    prefix = torch.zeros(3, 256, device=device).bfloat16()
    generator = torch.Generator().manual_seed(0)
    listed = [torch.randint(256, (3, 16, 32), dtype=U8, generator=generator).to(device) for _ in range(images)]
    tokens, _ = functional.patch_embed_packed(listed, weight, prefix=prefix, backend="triton")
    (found,) = torch.autograd.grad(tokens.float().square().sum(), [weight])
    return found


def packed_splits(launched: list[tuple[Any, tuple[int, ...]]]) -> list[int]:
    return [grid[1] for entry, grid in launched if entry.kernel == "packed_weight_gradient"]


def test_forced_programs_set_the_split_of_packed_images(device: str, launched: list) -> None:
    found = []
    for programs in (12, 24, None):
        with tuning.forced_configuration(programs=programs):
            found.append(packed_step(device, 300))
    assert packed_splits(launched)[:2] == [1, 2] and packed_splits(launched)[2] > 2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-2, atol=0)


def test_packed_images_follow_the_table(use: Callable, device: str, launched: list) -> None:
    """By the number of their patches, without prefix rows."""
    where = torch.empty(0, device=device).device
    problem = Problem("patch_embed_packed", TRAINING, U8, BF16, BF16, (256, 3, 16, 16), False)
    times = {"triton": 1.0, "reference": 2.0}
    choices = {
        rows: Choice("triton", times, Configuration(programs=programs)) for rows, programs in ((512, 12), (1024, 24))
    }
    use(Table(tuning.device_name(where), tuning.current_versions(), {problem: choices}))
    for images in (256, 300):  # of 512 and 600 patches
        packed_step(device, images)
    assert packed_splits(launched) == [1, 2]


def test_tuning_measures_every_configuration(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvit.benchmarks import timing
    from fastvit.benchmarks.tune import WIDTHS, Scope, tune
    from fastvit.kernels.row_sums import TARGET_PROGRAMS

    monkeypatch.setattr(timing, "WARM_UP", 0)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    monkeypatch.setitem(WIDTHS, "Ti", 32)
    scope = Scope((1,), ("uint8 to bfloat16",), 0.01)
    table = tune(device, ("Ti",), backends=["triton"], scope=scope, image=16, patch=16)
    found = {(p.op, p.mode): choice for p, measured in table.choices.items() for choice in measured.values()}
    assert all(choice.excluded == {} for choice in found.values()), found
    served, trained = found["patch_embed", FORWARD], found["patch_embed", TRAINING]
    assert set(served.times_us) == {"reference", "triton, medium", "triton, small"}
    tile = served.configuration.tile
    assert tile in ("medium", "small") and served.times_us[f"triton, {tile}"] == min(
        time for name, time in served.times_us.items() if name != "reference"
    )
    counts = (TARGET_PROGRAMS // 2, TARGET_PROGRAMS, 2 * TARGET_PROGRAMS)
    splits = {f"triton, {tile} weight {name} {count} programs" for name in ("medium", "large") for count in counts}
    assert set(trained.times_us) == {"reference", *splits}
    assert trained.configuration.programs in counts and trained.configuration.weight_tile in ("medium", "large")
    assert set(found["add_position", TRAINING].times_us) == {"reference", "triton"}
    packed = {f"triton, {count} programs" for count in counts}
    assert set(found["patch_embed_packed", FORWARD].times_us) == {"reference", "triton"}
    assert set(found["patch_embed_packed", TRAINING].times_us) == {"reference", *packed}
