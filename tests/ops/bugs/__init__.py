"""Bugs to plant in the Triton kernels, one module an op: MODULE, TABLE (op to the names of its forward and backward
in that module) and BUGS."""
