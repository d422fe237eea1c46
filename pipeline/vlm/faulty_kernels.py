"""Ways around faults of cuDNN that torch runs into on today's GPUs. On a CPU nothing changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def avoid_faulty_kernels(model: nn.Module) -> None:
    """Keep attention away from cuDNN in this process, and let the model's Conv3d over single patches be products.

    cuDNN is torch's first choice for attention on H100 and later. With a mask its backward gives NaN gradients of the
    queries for some lengths (pytorch#196678, seen with Qwen2.5 in trl#7181), and answers of models with few key heads
    were wrong on B200 (pytorch#193893). The flash and memory-efficient kernels stay.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in model.modules():
        if type(module) is nn.Conv3d and _of_single_patches(module):
            module.__class__ = PatchConv3d


class PatchConv3d(nn.Conv3d):
    """A Conv3d whose kernel is as large as its step, as Qwen-VL's and GLM-V's patch embeddings are.

    Where the input is one patch a row, it is one matrix product. cuDNN has no fast kernel for it with torch 2.9
    (pytorch#174051) nor in bfloat16 on Blackwell (transformers#45750). The names of its parameters stay.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, channels, *kernel] -> [N, width, 1, 1, 1]; other inputs, and those on a CPU, as nn.Conv3d."""
        if not input.is_cuda or input.shape[2:] != self.kernel_size:
            return super().forward(input)
        return patch_products(self, input)


def patch_products(conv: nn.Conv3d, patches: Tensor) -> Tensor:
    """[N, channels, *kernel] -> [N, width, 1, 1, 1]: each patch times the kernels."""
    products = functional.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)
    return products[..., None, None, None]


def _of_single_patches(conv: nn.Conv3d) -> bool:
    plain = conv.padding == (0, 0, 0) and conv.dilation == (1, 1, 1) and conv.groups == 1
    return plain and conv.stride == conv.kernel_size
