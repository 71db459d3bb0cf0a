"""The benchmark suites: the files of the folder benchmarks/ at the top of the repository.

This file serves a source tree or an editable install, where it points the import system at that folder. An
installed wheel holds the files themselves here (``package_dir`` in setup.py), and not this one.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
