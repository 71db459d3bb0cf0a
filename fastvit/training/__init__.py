"""Training a Vision Transformer on raw uint8 images, from options to checkpoints.

from fastvit.training import TrainOptions, train
result = train(TrainOptions(data="digits", output="out/train"))
"""

from __future__ import annotations

from .errors import CheckpointError, DataError, OptionError, TrainingError, UserError
from .loop import TrainResult, resume_options, train
from .options import TrainOptions

__all__ = [
    "CheckpointError",
    "DataError",
    "OptionError",
    "TrainOptions",
    "TrainResult",
    "TrainingError",
    "UserError",
    "resume_options",
    "train",
]
