"""The CPU backend: pure torch made fast, and like every backend held to the reference."""
