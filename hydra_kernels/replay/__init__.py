"""A function of PyTorch recorded once and replayed without PyTorch: a CUDA graph's idea, on a CPU.

A decoding step of a language model is some hundred operations on a few rows, and on a CPU most of
its time goes into calling them. :class:`Replay` runs the function once, keeps the list of tensor
operations that it came to, and from then on runs that list in C++ over the same storages, in one
call. Whatever was fixed when the function ran stays so: shapes, Python numbers, branches. Whatever
lies in tensors is read anew: a replay sees new weights and new inputs in the same tensors.
"""

from hydra_kernels.replay.draw import draw_tokens, filter_logprobs
from hydra_kernels.replay.lowering import NotReplayable
from hydra_kernels.replay.record import Replay, unavailable

__all__ = ["NotReplayable", "Replay", "draw_tokens", "filter_logprobs", "unavailable"]
