"""The one place that decides how a network and its images lie in memory."""

import torch
from torch import nn


def layout_of(network: nn.Module, channels_last: bool = True) -> torch.memory_format:
    """The memory layout for a network and the images that go into it.

    channels_last is what convolutions want, on GPUs and on CPUs. A network with a narrow strided 1x1 convolution stays
    contiguous: torch 2.6.0, 2.13.0, 2.14.1 and 2.15.0 write out of bounds in the backward pass of a 1x1 convolution of
    stride 2 with fewer than 8 input channels, in channels_last, on the CPU with one thread (oneDNN's kernels
    for AVX2; on processors with AVX-512, ``ONEDNN_MAX_CPU_ISA=AVX2`` shows it). Nothing is said of it until the heap
    breaks. The rule does not ask for version, device or threads: a network so narrow gains nothing from the layout.

    Args:
        network: any module; its convolutions are looked at.
        channels_last: whether channels_last is wanted at all.
    """
    if channels_last and not any(_breaks_the_heap(module) for module in network.modules()):
        return torch.channels_last
    return torch.contiguous_format


def _breaks_the_heap(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 8
    )
