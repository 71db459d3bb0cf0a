"""The demo's pictures. Each function draws one PNG; colours are distinguishable in grey and for the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvit.plots import BLUE, COLOURS, GREY, ORANGE, new_figure, save, styled


@styled
def draw_curves(path: Path, histories: dict[str, Sequence[dict[str, float]]], goal: float) -> Path:
    """Loss and test accuracy over the epochs; `histories` by the name of the run."""
    figure, axes = new_figure(1, 2, (11, 3.8))
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
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False, fontsize=10)
    return save(figure, path)


@styled
def draw_first_losses(path: Path, ours: Sequence[float], theirs: Sequence[float]) -> Path:
    """The first losses of both implementations, and their difference."""
    figure, axes = new_figure(1, 2, (11, 3.4))
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
    return save(figure, path)


def position_similarity(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine similarity of each patch's position with every other: [gh, gw, gh, gw] from [N, D]."""
    unit = F.normalize(positions.detach().float().cpu(), dim=-1)
    return (unit @ unit.T).view(*grid, *grid)


def mean_similarity(positions: Tensor, grid: tuple[int, int]) -> dict[str, float]:
    """Mean similarity of neighbouring patches, and of patches many steps (along rows and columns) apart."""
    similarity = position_similarity(positions, grid).flatten(2).flatten(0, 1)  # [N, N]
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], 1).float()  # [N, 2]
    steps = torch.cdist(place, place, p=1)
    far = sum(grid) // 2
    return {
        "neighbours": similarity[steps == 1].mean().item(),
        "far": similarity[steps >= far].mean().item(),
        "far_steps": far,
    }


@styled
def draw_positions(path: Path, positions: Tensor, grid: tuple[int, int]) -> Path:
    """The position-embedding similarity map of Dosovitskiy et al. (2021), figure 7, middle."""
    height, width = grid
    maps = position_similarity(positions, grid).transpose(1, 2).reshape(height * height, width * width)
    figure, axes = new_figure(1, 1, (6.4, 5.6))
    axis = axes[0][0]
    image = axis.imshow(maps.numpy(), cmap="viridis", vmin=-1, vmax=1)
    for column in range(1, width):
        axis.axvline(column * width - 0.5, color="white", lw=4)
    for row in range(1, height):
        axis.axhline(row * height - 0.5, color="white", lw=4)
    axis.set_xticks([(column + 0.5) * width - 0.5 for column in range(width)], range(1, width + 1))
    axis.set_yticks([(row + 0.5) * height - 0.5 for row in range(height)], range(1, height + 1))
    axis.set(xlabel="input patch column", ylabel="input patch row")
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="cosine similarity", shrink=0.85)
    return save(figure, path)


@torch.no_grad()
def class_attention(model: nn.Module, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the class token looks at in the last block, averaged over the heads: [B, gh, gw], at most 1 each."""
    model.eval()
    maps = model.get_attention_maps(images, 1)[-1]  # type: ignore[operator]  # [B, heads, T, T]
    patches = grid[0] * grid[1]
    looked = maps.float().mean(1)[:, 0, -patches:].view(-1, *grid)
    return looked / looked.amax((1, 2), keepdim=True)


@styled
def draw_attention(path: Path, model: nn.Module, images: Tensor, classes: Sequence[str]) -> Path:
    """A digit of each class, the attention of the class token with its outline over it, and the prediction."""
    grid = tuple(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
    attention = class_attention(model, images, grid).cpu()
    with torch.no_grad():
        predicted = model(images).argmax(-1).tolist()
    pixels = images[:, 0].float().cpu()
    height, width = pixels.shape[-2:]
    figure, axes = new_figure(2, len(images), (1.1 * len(images), 2.9))
    for index in range(len(images)):
        above, below = axes[0][index], axes[1][index]
        above.imshow(pixels[index].numpy(), cmap="gray", vmin=0, vmax=255)
        title = f"{classes[index]} → {classes[predicted[index]]}"
        above.set_title(title, color="black" if predicted[index] == index else ORANGE, loc="center")
        edges = (-0.5, width - 0.5, height - 0.5, -0.5)
        below.imshow(attention[index].numpy(), cmap="inferno", vmin=0, vmax=1, extent=edges)
        below.contour(pixels[index].numpy(), levels=[100], colors="white", linewidths=1.2)
        for axis in (above, below):
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
    axes[0][0].set_ylabel("image")
    axes[1][0].set_ylabel("attention")
    return save(figure, path)
