"""The CUDA C++ kernels on the host: compiled from csrc/ on demand, every access checked. For validation; very slow."""
