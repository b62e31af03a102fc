"""The CUDA C++ kernels run on the CPU, by an emulator of CUDA's execution model for tests.

``translate`` rewrites the text of csrc/cuda where it is not C++ (launches, ``__shared__``, inline
PTX), ``build`` compiles that with g++ against headers that stand in for CUDA's (``include``), and
``device`` puts the result where the extension's CUDA entries are, so that the product's own Python
launches it. ``emulator.cpp`` says how threads are run and what is looked at.

Found, with the line of csrc where there is one: barriers and shuffles that not all threads reach;
races in shared and global memory, within a warp, a block or between blocks, a missing fence among
them; accesses outside of the tensors handed over; shared memory read before it is written;
misaligned vectors; indices past an array's end; waiting for a block that cannot run; counters not
set back; and whatever the ops' own tests see: wrong indices, masks, tiles, sums. ``mutants`` breaks
the kernels on purpose, and ``python -m tests.cuda_on_cpu.mutants`` shows that each is noticed.

Not found: what is a matter of time or of the machine (speed, occupancy, registers, bank conflicts,
caches beyond the read-only one, streams that run beside each other, graphs); the tensor cores' own
order of summation, and CUDA's own roundings of exp, log and tanh; memory order finer than fences,
atomics and barriers; a tensor of the launch written where it should only be read, or one view of a
storage run over into the next. A GPU is needed for these, and for what nvcc makes of the code.
"""
