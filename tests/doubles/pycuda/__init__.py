"""A double of the used part of pycuda: host memory in place of the GPU's."""
