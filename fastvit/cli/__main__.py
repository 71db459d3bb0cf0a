"""`python -m fastvit.cli`, for torchrun and where the `fastvit` script is not on the path."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
