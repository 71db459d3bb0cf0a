"""Training a Vision Transformer on raw uint8 images, from options to checkpoints.

from fastvit.training import TrainOptions, train
run = train(TrainOptions(data="digits", output="out/train"))
"""

from __future__ import annotations

from fastvit.checkpoints.errors import CheckpointError

from .errors import DataError, OptionError, TrainingError, UserError
from .loop import train
from .options import TrainOptions
from .run import Run
from .saving import resume_options

__all__ = [
    "CheckpointError",
    "DataError",
    "OptionError",
    "Run",
    "TrainOptions",
    "TrainingError",
    "UserError",
    "resume_options",
    "train",
]
