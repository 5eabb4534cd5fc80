"""Gluon kernels on a CPU: `machine.py` is the model of a Hopper multiprocessor, `language.py` what a kernel imports.

What is modelled: warp-specialised partitions that run in any order; mbarriers with phases, arrivals and bytes; TMA
copies that land late, early, in pieces and in any order; wgmma that reads its operands anywhere between issue and wait;
32-bit integers. A vector clock finds every access that no barrier orders, whether or not this run's order shows it.

What is not: warps inside a partition (they walk in step; Triton's own analysis puts barriers between them), register
layouts and swizzles (the compiler checks them), instruction order after ptxas, timing, and whether the compiler
translates rightly. Those are for tests/build/offline and for a GPU.
"""
