"""A double of the used part of cuda.bindings: capture and launch of graphs on the double of pycuda."""
