"""Parts of Triton kernels that several ops have."""
