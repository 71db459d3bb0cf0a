"""Where in a checkpoint the Vision Transformers are, whatever a training has wrapped around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fastvit.checkpoints.errors import CheckpointError, listed
from fastvit.checkpoints.layouts import LAYOUTS
from fastvit.checkpoints.naming import Layout, State

ROOT = "."  # what a model is called that stands in the checkpoint by itself

# What torch.compile, FSDP and activation checkpointing put into names, in front of any module.
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")
# DINOv2's own files have blocks in chunks, and count them through: blocks.0.3 is block 3.
_CHUNK = re.compile(r"((?:^|\.)blocks\.)\d+\.(?=\d+\.(norm[12]|attn|mlp|ls[12]|gamma_[12])\b)")

# Of models of one shape, which one people mean: an average over the training, a teacher, a target's encoder rather than
# what learns from them; and of two encoders that which is trained rather than the one that follows by momentum.
_PREFERRED = re.compile(r"(?:^|[._])ema(?:[._]|$)|(?:^|\.)(teacher|target_encoder)(?:\.|$)")
_DEFERRED = re.compile(r"(?:^|\.)(student|encoder_k)(?:\.|$)|(?:^|[._])momentum(?:[._]|$)")
# Where a head is the projection of a self-supervised training, which its encoder is taken without.
_SELF_SUPERVISED = re.compile(r"(?:^|[._])(student|teacher|momentum|base_encoder|encoder_[qk]|online|target)(?:[._]|$)")


@dataclass(frozen=True)
class Model:
    """A Vision Transformer inside a checkpoint.

    Attributes:
        root: what all of its names begin with, "state_dict.model." for example.
        layout: its names.
        state: its tensors, without the root.
    """

    root: str
    layout: Layout
    state: State = field(default_factory=dict)

    @property
    def start(self) -> str:
        """What the names of its encoder begin with."""
        return self.root + self.layout.prefix

    @property
    def path(self) -> str:
        """What to call it."""
        return self.start[:-1] or ROOT

    @property
    def is_self_supervised(self) -> bool:
        """Whether it is half of a pair that learns without labels."""
        return bool(_SELF_SUPERVISED.search(self.path))


def normalised(state: Mapping[str, Tensor]) -> State:
    """Without what wrappers inside a model add to names; a name that another tensor has stays as it is."""
    plain: State = {}
    for name, tensor in state.items():
        short = _CHUNK.sub(r"\1", _WRAPPER.sub("", name))
        plain[name if short != name and (short in state or short in plain) else short] = tensor
    return plain


def find_models(state: Mapping[str, Tensor]) -> list[Model]:
    """Every Vision Transformer, by the names of its patches' projection and its blocks."""
    best: dict[str, tuple[tuple[int, int], Model]] = {}
    for layout in LAYOUTS:
        for root in _roots(state, layout.names_of("patch_embed.proj.weight")[0]):
            inside = [name.removeprefix(root) for name in state if name.startswith(root)]
            places = [place for name in inside if (place := layout.find(name))]
            score, model = (len(places), len(layout.prefix)), Model(root, layout)
            has_blocks = any(ours.startswith("blocks.") for ours, _ in places)
            if has_blocks and (model.path not in best or score > best[model.path][0]):
                best[model.path] = score, model
    models = [model for _, model in best.values()]
    return [replace(model, state=_state_of(model, models, state)) for model in models]


def _roots(names: Iterable[str], anchor: str) -> list[str]:
    ends = [name.removesuffix(anchor) for name in names if name.endswith(anchor)]
    return [root for root in ends if root == "" or root[-1] in "./"]


def _state_of(model: Model, models: Sequence[Model], state: Mapping[str, Tensor]) -> State:
    """What stands under a model's root, without the models that stand there too."""
    others = [other.root if len(other.root) > len(model.root) else other.start for other in models]
    inside = tuple(other for other in others if other.startswith(model.root) and not model.start.startswith(other))
    return {
        name[len(model.root) :]: tensor
        for name, tensor in state.items()
        if name.startswith(model.root) and not name.startswith(inside)
    }


def choose(models: Sequence[Model], key: str | None) -> Model:
    """The model that is meant.

    Args:
        models: of one checkpoint, at least one.
        key: the path of the model that is wanted, or a part of it that no other has.

    Raises:
        CheckpointError: `key` names none of them or several, or it has to be said; the message lists them.
    """
    paths = listed([model.path for model in models])
    if key is not None:
        wanted = _WRAPPER.sub("", f"{key}.")[:-1]
        named = [model for model in models if model.path == wanted]
        named = named or [model for model in models if f".{wanted}." in f".{model.path}."]
        if len(named) != 1:
            what = "several" if named else "none"
            raise CheckpointError(f"key: {key!r} names {what} of its Vision Transformers; accepted: {paths}")
        return named[0]
    different = [
        model for index, model in enumerate(models) if not any(_equal(model, earlier) for earlier in models[:index])
    ]
    best = max(map(_rank, different))
    likely = [model for model in different if _rank(model) == best]
    if len(likely) > 1 or any(_shapes(model) != _shapes(likely[0]) for model in different):
        raise CheckpointError(
            f"has several Vision Transformers; say which, with key=…, on the command line --key; accepted: {paths}"
        )
    return likely[0]


def _rank(model: Model) -> int:
    return bool(_PREFERRED.search(model.path)) - bool(_DEFERRED.search(model.path))


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of the tensors that the layout knows, less the head's, which only one of a pair may have."""
    places = {name: model.layout.find(name) for name in model.state}
    return {
        place[0]: tuple(model.state[name].shape)
        for name, place in places.items()
        if place and not place[0].startswith("head.")
    }


def _equal(model: Model, other: Model) -> bool:
    """Whether one is the other by another name."""
    ours, theirs = model.state, other.state
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and tensor.equal(theirs[name]) for name, tensor in ours.items()
    )
