"""Tuning tables that ship with the package, one a GPU: <device>.json, as `fastvit tune --output` writes them."""
