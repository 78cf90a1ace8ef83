"""What a run stands on. Import it before torch, whose libraries read what is set here when loaded; what the user set stays."""

import os

# Tensors of 2 MB and more in large pages, where Linux gives them on request: glibc returns freed blocks above 32 MB, such as
# logits, to the kernel, and the next step waits for page faults (torch's c10/core/impl/alloc_cpu.cpp).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# libgomp's threads spin while they wait: beside any other process one keeps the thread that it waits for off its core
# (benchmarks/README.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
