"""What a training step reads, writes and launches on a GPU, counted without one."""
