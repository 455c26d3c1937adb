"""The runner on CUDA: passes over the Triton kernels, with CUDA graphs, pinned staging and one host sync per pass."""
