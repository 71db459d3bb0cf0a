"""Every setting of a training run, with its default, and the check that refuses bad ones before anything starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

from fastvit.peers import import_peer

from .errors import OptionError

DIGITS = "digits"
DIGITS_MODEL = "vit_digits"
FOLDER_MODEL = "vit_tiny_patch16_224"
AMP_MODES = ("off", "bf16", "fp16")
AUTO_AUGMENTS = ("randaugment", "trivialaugment")
SHARD_MODES = ("none", "full", "hybrid")

# What a resumed run may change: nothing here alters the numbers that are trained.
# (`threads`, `device`, `compile` and `shard` do change the rounding: bit-exact continuation needs them to be the same.)
OF_A_PROCESS = ("data", "device", "threads", "workers", "tensorboard", "init_from", "output")
FREE_ON_RESUME = (
    *("data", "device", "threads", "workers", "output", "tensorboard", "save_steps", "keep"),
    *("compile", "shard", "shard_size", "checkpoint_blocks"),
)


@dataclass(frozen=True)
class TrainOptions:
    """The settings of one run. They are stored in the checkpoint, so that `--resume` needs none of them."""

    data: str = DIGITS
    model: str = ""  # "": vit_digits for the digits, vit_tiny_patch16_224 for a folder
    image_size: int = 0  # 0: 8 for the digits, 224 for a folder
    channels: int = 0  # 0: 1 for the digits, 3 for a folder
    validation_share: float = 0.2  # of a folder without train/ and val/
    epochs: int = 0  # 0: 36 for the digits, 100 for a folder
    batch_size: int = 0  # in each process; 0: 32 for the digits, 64 for a folder, none beside tokens_per_batch
    accumulate_steps: int = 1  # batches in each process before a step
    tokens_per_batch: int = 0  # in each process, of images that keep their shapes; 0: off, all are image_size
    max_tokens: int = 0  # patches of an image at most, with tokens_per_batch; 0: as many as image_size has
    lr: float = 0.0  # 0: 2e-3 for the digits, 5e-4 for a folder
    min_lr: float = -1.0  # at the last step; -1: a hundredth of lr
    warmup_epochs: float = -1.0  # -1: a tenth of the epochs
    weight_decay: float = 0.05
    clip_grad: float = 1.0  # 0: off
    label_smoothing: float = 0.1
    drop_path: float = 0.0
    layer_decay: float = 1.0  # of the learning rate, from each block to the one before it; 1: off
    mixup: float = 0.0  # alpha of the Beta distribution that lambda is drawn from; 0: off
    cutmix: float = 0.0  # the same of CutMix
    mixup_prob: float = 1.0  # of a batch to be mixed
    mixup_switch_prob: float = 0.5  # of CutMix rather than mixup, where both are on
    ema: float = 0.0  # decay a step of an average of the parameters; 0: off
    ema_warmup: bool = False  # a decay that rises to `ema` in the first steps
    augment: bool = True
    auto_augment: str = ""  # behind crop and flip, of a folder or shards; "": off
    repeated_aug: int = 1  # times an image comes in an epoch, of as many images as before; 1: off
    amp: str = "off"
    compile: bool = False
    shard: str = "none"
    shard_size: int = 0  # processes that hold one model, with shard "hybrid"; 0: those of one machine
    checkpoint_blocks: int = 0  # blocks recomputed in the backward pass
    seed: int = 0
    device: str = "auto"
    threads: int = -1  # 0: as torch chooses; -1: 1 for the digits, whose steps are too small to share; 0 for a folder
    workers: int = -1  # processes that decode images; -1: none for the digits, 2 for a folder
    init_from: str = ""  # weights to start from: a checkpoint or a plain state_dict
    output: str = "out/train"
    save_steps: int = 0  # 0: save after each epoch only
    keep: int = 0  # checkpoints in shards, beside the best one; 0: 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        self._fill_defaults()
        for name, accepted, good in _RULES:
            if not good(getattr(self, name)):
                raise OptionError(name, getattr(self, name), accepted)
        self._check_tokens()
        self._check_recipe()
        if self.keep and self.shard == "none":
            raise OptionError("keep", self.keep, "with --shard alone (leave it out): others have last.pt and best.pt")
        if self.shard_size and self.shard != "hybrid":
            raise OptionError("shard_size", self.shard_size, "with --shard hybrid alone (leave it out)")
        if self.min_lr > self.lr:
            raise OptionError("min_lr", self.min_lr, f"a number from 0 to the learning rate, {self.lr:g}")
        if self.warmup_epochs > self.epochs:
            raise OptionError("warmup_epochs", self.warmup_epochs, f"a number from 0 to the epochs, {self.epochs}")

    def _check_tokens(self) -> None:
        if not self.tokens_per_batch:
            if self.max_tokens:
                raise OptionError("max_tokens", self.max_tokens, "with --tokens-per-batch alone (leave it out)")
            return
        if self.is_digits:
            raise OptionError("tokens_per_batch", self.tokens_per_batch, "a folder's alone: digits are of one size")
        if self.batch_size:
            accepted = "none beside --tokens-per-batch, which settles how many images a step has"
            raise OptionError("batch_size", self.batch_size, accepted)
        if self.compile:
            accepted = "off beside --tokens-per-batch: every step has other sizes, and would be compiled anew"
            raise OptionError("compile", self.compile, accepted)
        for name in ("mixup", "cutmix"):
            if getattr(self, name):
                accepted = "0 beside --tokens-per-batch: images of several sizes cannot be mixed"
                raise OptionError(name, getattr(self, name), accepted)

    def _check_recipe(self) -> None:
        """Refuse what would change nothing."""
        needed = {
            "mixup_prob": (self.mixes, "with --mixup or --cutmix"),
            "mixup_switch_prob": (self.mixup and self.cutmix, "with both --mixup and --cutmix"),
            "ema_warmup": (self.ema, "with --ema"),
            "repeated_aug": (self.augment, "with augmentation"),
            "auto_augment": (self.augment and not self.is_digits, "with augmentation of a folder"),
        }
        for name, (is_met, condition) in needed.items():
            if not is_met and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise OptionError(name, getattr(self, name), f"{condition} alone (leave it out)")

    def _fill_defaults(self) -> None:
        """Put what depends on the data in the place of each placeholder, so that a checkpoint stores real values."""
        defaults = {name: values[not self.is_digits] for name, values in _DEFAULTS.items()}
        for name in defaults:
            if type(getattr(self, name)) is bool or getattr(self, name) != self.__dataclass_fields__[name].default:
                defaults[name] = getattr(self, name)
        if self.tokens_per_batch:
            defaults["batch_size"] = self.batch_size
        if self.min_lr == -1 and _number(defaults["lr"]):
            defaults["min_lr"] = defaults["lr"] / 100
        if self.warmup_epochs == -1 and _number(defaults["epochs"]):
            defaults["warmup_epochs"] = defaults["epochs"] / 10
        self.__dict__.update(defaults)  # frozen: no attribute can be set

    @property
    def is_digits(self) -> bool:
        return self.data == DIGITS

    def trained(self) -> dict[str, Any]:
        """Those that settle what is trained, and how: all but what a process may have of its own."""
        return {name: value for name, value in asdict(self).items() if name not in OF_A_PROCESS}

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def resumed_with(self, given: dict[str, Any]) -> TrainOptions:
        """These options with those in `given`; one that would change what is trained is refused."""
        for name, value in given.items():
            stored = getattr(self, name)
            if name not in FREE_ON_RESUME and value != stored:
                raise OptionError(name, value, f"{stored!r} when resuming, as in the checkpoint (leave it out)")
        # What the checkpoint says of its own way of sharding is nothing to another.
        return replace(self, **{**({"shard_size": 0, "keep": 0} if "shard" in given else {}), **given})


def peer_for(name: str, value: Any, module: str) -> ModuleType:
    """A library's module that the option `name` needs. Raises OptionError where it can't be imported."""
    library = module.partition(".")[0]
    try:
        return import_peer(module)
    except ImportError as error:
        accepted = f"the default (leave it out) without {library}; `pip install {library}` adds it ({error})"
        raise OptionError(name, value, accepted) from error


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Where a field has its placeholder: the default for the digits, and for a folder.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "model": (DIGITS_MODEL, FOLDER_MODEL),
    "epochs": (36, 100),
    "batch_size": (32, 64),
    "lr": (2e-3, 5e-4),
    "threads": (1, 0),
    "workers": (0, 2),
}

_RULES: tuple[tuple[str, str, Any], ...] = (
    ("data", "'digits' or a folder with one directory of images for each class", lambda v: bool(v)),
    ("image_size", "a whole number of at least 1 (0: the default)", lambda v: _whole(v, 0)),
    ("channels", "1 or 3 (0: the default)", lambda v: v in (0, 1, 3)),
    ("validation_share", "a number above 0 and below 1", lambda v: _number(v) and 0 < v < 1),
    ("epochs", "a whole number of at least 1", lambda v: _whole(v, 1)),
    ("batch_size", "a whole number of at least 1", lambda v: _whole(v, 0)),  # 0 is left beside tokens_per_batch alone
    ("accumulate_steps", "a whole number of at least 1", lambda v: _whole(v, 1)),
    ("tokens_per_batch", "a whole number of at least 1 (0: off)", lambda v: _whole(v, 0)),
    ("max_tokens", "a whole number of at least 1 (0: the patches of image_size)", lambda v: _whole(v, 0)),
    ("lr", "a number above 0", lambda v: _number(v) and v > 0),
    ("min_lr", "a number of at least 0 (-1: a hundredth of the learning rate)", lambda v: _number(v) and v >= 0),
    ("warmup_epochs", "a number of at least 0", lambda v: _number(v) and v >= 0),
    ("weight_decay", "a number of at least 0", lambda v: _number(v) and v >= 0),
    ("clip_grad", "a number of at least 0 (0: no clipping)", lambda v: _number(v) and v >= 0),
    ("label_smoothing", "a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1),
    ("drop_path", "a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1),
    ("layer_decay", "a number above 0, at most 1 (1: off)", lambda v: _number(v) and 0 < v <= 1),
    ("mixup", "a number of at least 0 (0: off)", lambda v: _number(v) and v >= 0),
    ("cutmix", "a number of at least 0 (0: off)", lambda v: _number(v) and v >= 0),
    ("mixup_prob", "a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1),
    ("mixup_switch_prob", "a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1),
    ("ema", "a number from 0 to below 1 (0: off)", lambda v: _number(v) and 0 <= v < 1),
    ("auto_augment", "one of " + ", ".join(AUTO_AUGMENTS), lambda v: v in ("", *AUTO_AUGMENTS)),
    ("repeated_aug", "a whole number of at least 1 (1: off)", lambda v: _whole(v, 1)),
    ("amp", "one of " + ", ".join(AMP_MODES), lambda v: v in AMP_MODES),
    ("shard", "one of " + ", ".join(SHARD_MODES), lambda v: v in SHARD_MODES),
    ("shard_size", "a whole number of at least 1 (0: the processes of one machine)", lambda v: _whole(v, 0)),
    ("checkpoint_blocks", "a whole number of at least 0 (0: off)", lambda v: _whole(v, 0)),
    ("seed", "a whole number from 0 to 2**31 - 1", lambda v: _whole(v, 0) and v < 2**31),
    ("threads", "a whole number of at least 1 (0: as torch chooses)", lambda v: _whole(v, 0)),
    ("workers", "a whole number of at least 0 (-1: the default)", lambda v: _whole(v, -1)),
    ("output", "a folder to write to", lambda v: bool(v)),
    ("keep", "a whole number of at least 1 (0: two)", lambda v: _whole(v, 0)),
    ("save_steps", "a whole number of at least 0 (0: after each epoch only)", lambda v: _whole(v, 0)),
)
