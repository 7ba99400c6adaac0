"""Compiled kernels, executed on a CPU, checked and counted: the PTX for sm_80 and sm_90, as Triton and nvcc make it.

To be read in this order. `core/machine.h`: the state of a launch, a block and a warp; `core/schedule.cpp`: who runs
when; `core/memory.cpp`: accesses and what is checked of them; `core/arithmetic.cpp`, `conversions.cpp`,
`exchanges.cpp`, `matrices.cpp`, `asynchronous.cpp`: the instructions. `ptx.py` reads a kernel's text, `encode.py` makes
instructions of it, `library.py` builds the core, `machine.py` launches. `device.py` puts this below Triton, `tubes.py`
and `cudart.cpp` below the host code of csrc/. `proof.py` says what an operator must show.

Not modelled: lanes of a warp that race with each other, stores by tensor maps, clusters, sm_100 and later. What is not
known is refused with its line of PTX.
"""
