"""A thin PyTorch model of Mirasol3B over `mirasol.kernels`."""
