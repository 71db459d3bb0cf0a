"""The demo's pictures. Each function draws one PNG; colours are distinguishable in grey and for the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7")
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": "#b9bec6",
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
}


def _figure(rows: int, columns: int, size: tuple[float, float], **keywords: Any) -> tuple[Any, Any]:
    """A figure that needs no display and leaves the caller's matplotlib as it was."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **keywords)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path


def draw_curves(path: Path, histories: dict[str, Sequence[dict[str, float]]], goal: float) -> Path:
    """Loss and test accuracy over the epochs; `histories` by the name of the run."""
    figure, axes = _figure(1, 2, (11, 3.8))
    loss, accuracy = axes[0]
    for (name, history), colour in zip(histories.items(), COLOURS, strict=False):
        epochs = [row["epoch"] for row in history]
        loss.plot(epochs, [row["train_loss"] for row in history], color=colour, label=f"{name}, training")
        loss.plot(epochs, [row["test_loss"] for row in history], color=colour, ls="--", label=f"{name}, test")
        values = [100 * row["test_accuracy"] for row in history]
        accuracy.plot(epochs, values, color=colour, label=f"{name}: {values[-1]:.2f}%")
    accuracy.axhline(100 * goal, color=GREY, lw=1, ls=":", label=f"required: {100 * goal:.0f}%")
    loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy")
    accuracy.set(title="Test accuracy", xlabel="epoch", ylabel="%", ylim=(0, 101))
    loss.set_ylim(bottom=0)
    for axis in (loss, accuracy):
        axis.legend(frameon=False, fontsize=10)
    return _save(figure, path)


def draw_first_losses(path: Path, ours: Sequence[float], theirs: Sequence[float]) -> Path:
    """The first losses of both implementations, and their difference."""
    figure, axes = _figure(1, 2, (11, 3.4))
    losses, difference = axes[0]
    steps = range(1, len(ours) + 1)
    losses.plot(steps, theirs, color=ORANGE, lw=5, alpha=0.45, label="timm")
    losses.plot(steps, ours, color=BLUE, lw=1.6, label="FastViT")
    losses.set(title="Loss of the first steps", xlabel="step", ylabel="cross-entropy")
    losses.legend(frameon=False)
    # Equal bits have no place on a logarithmic axis: draw them at the bottom.
    gaps = [max(abs(a - b), 1e-9) for a, b in zip(ours, theirs, strict=True)]
    difference.semilogy(steps, gaps, color=BLUE, marker="o", ms=3, lw=1)
    difference.axhline(1.2e-7, color=GREY, ls=":", lw=1, label="fp32 rounding (1.2e-7)")
    difference.set(title="|FastViT − timm|", xlabel="step", ylim=(5e-10, 1e-3))
    difference.legend(frameon=False)
    return _save(figure, path)


def position_similarity(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine similarity of each patch's position with every other: [gh, gw, gh, gw] from [N, D]."""
    unit = F.normalize(positions.detach().float().cpu(), dim=-1)
    return (unit @ unit.T).view(*grid, *grid)


def draw_positions(path: Path, positions: Tensor, grid: tuple[int, int]) -> Path:
    """The position-embedding similarity map of Dosovitskiy et al. (2021), figure 7, middle."""
    similarity = position_similarity(positions, grid)
    figure, axes = _figure(grid[0], grid[1], (6.4, 5.6))
    image = None
    for row in range(grid[0]):
        for column in range(grid[1]):
            axis = axes[row][column]
            image = axis.imshow(similarity[row, column].numpy(), cmap="viridis", vmin=-1, vmax=1)
            axis.grid(False)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if row == grid[0] - 1:
                axis.set_xlabel(str(column + 1))
            if column == 0:
                axis.set_ylabel(str(row + 1), rotation=0, va="center", labelpad=10)
    figure.supxlabel("input patch column", fontsize=11)
    figure.supylabel("input patch row", fontsize=11)
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.85)
    return _save(figure, path)


@torch.no_grad()
def class_attention(model: nn.Module, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the class token looks at in the last block, averaged over the heads: [B, gh, gw], at most 1 each."""
    model.eval()
    maps = model.get_attention_maps(images, 1)[-1]  # type: ignore[operator]  # [B, heads, T, T]
    patches = grid[0] * grid[1]
    looked = maps.float().mean(1)[:, 0, -patches:].view(-1, *grid)
    return looked / looked.amax((1, 2), keepdim=True)


def draw_attention(path: Path, model: nn.Module, images: Tensor, labels: Sequence[str], classes: Sequence[str]) -> Path:
    """Digits, the attention of the class token over each, and the prediction."""
    grid = tuple(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
    attention = class_attention(model, images, grid)  # type: ignore[arg-type]
    with torch.no_grad():
        predicted = model(images).argmax(-1).tolist()
    pixels = images[:, 0].float().cpu()
    smooth = F.interpolate(attention[:, None].cpu(), pixels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    figure, axes = _figure(2, len(images), (1.35 * len(images), 3.3))
    for index in range(len(images)):
        right = classes[predicted[index]] == labels[index]
        for axis in axes[:, index]:
            axis.imshow(pixels[index].numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        axes[1][index].imshow(smooth[index].numpy(), cmap="inferno", alpha=0.7, vmin=0, vmax=1)
        axes[0][index].set_title(
            f"{labels[index]} → {classes[predicted[index]]}", color="black" if right else ORANGE, loc="center"
        )
    axes[0][0].set_ylabel("image")
    axes[1][0].set_ylabel("attention")
    return _save(figure, path)


def draw_benchmark(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A group of bars a case, in units of our median: longer than 1 is slower than FastViT."""
    cases = _cases(rows)
    figure, axes = _figure(1, 1, (11, 1.1 + sum(0.34 * len(found) + 0.5 for found in cases.values())))
    axis = axes[0][0]
    place, ticks, names = 0.0, [], []
    for title, found in cases.items():
        own = min(row["median_us"] for row in found if row["provider"].startswith("fastvit:"))
        axis.text(0, place - 0.75, title, fontweight="bold", fontsize=10, va="center")
        for row in sorted(found, key=lambda row: row["median_us"]):
            ours = row["provider"].startswith("fastvit:")
            relative = row["median_us"] / own
            axis.barh(place, relative, height=0.78, color=BLUE if ours else "#c3c9d1")
            axis.text(relative, place, f" {relative:.2f}x   {row['median_us'] / 1000:.2f} ms", va="center", fontsize=9)
            ticks.append(place)
            names.append(row["provider"])
            place += 1
        place += 1.4
    axis.axvline(1, color=BLUE, lw=1, ls=":")
    axis.set(yticks=ticks, yticklabels=names, xlabel="time in units of FastViT's (shorter is faster)")
    axis.set_ylim(place - 1, -1.4)
    axis.set_xlim(0, 1.25 * max((patch.get_width() for patch in axis.patches), default=1))
    axis.grid(False, axis="y")
    return _save(figure, path)


def _cases(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Measured rows by case; cases in which ours was not measured are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["median_us"] is not None:
            title = f"{row['op']}, {row['shape']}, {row['dtype']}, {row['mode']}"
            found.setdefault(title, []).append(row)
    return {k: v for k, v in found.items() if any(row["provider"].startswith("fastvit:") for row in v)}
