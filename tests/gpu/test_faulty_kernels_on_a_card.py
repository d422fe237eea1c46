"""What pipeline/vlm/faulty_kernels.py goes around, on the device itself."""

import math

import pytest
import torch
from tiny import write_vlm
from torch import nn
from torch.nn import functional

from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.faulty_kernels import PatchConv3d

pytestmark = pytest.mark.gpu


def test_gradients_of_masked_attention_are_finite(device, tmp_path):
    """A row whose logits are all near -120, at a length of 64 modulo 128: pytorch#196678."""
    load_vlm(write_vlm(tmp_path / "model", "qwen2_vl", 2, 32), torch.float32)
    length, width = 704, 64
    query, key, value = torch.randn(3, 1, 1, length, width, device=device, dtype=torch.bfloat16).unbind()
    query, key = (0.1 * query).clone(), (0.1 * key).clone()
    query[..., 0], key[..., 0] = 1.0, -120 * math.sqrt(width)
    query.requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out.backward(torch.randn_like(out))
    assert query.grad.isfinite().all()


def test_a_vision_tower_computes_what_it_did(device, tmp_path):
    model = load_vlm(write_vlm(tmp_path / "model", "qwen2_vl", 2, 32), torch.float32).to(device)
    (patches,) = [module for module in model.modules() if type(module) is PatchConv3d]
    pixels = torch.randn(12, patches.in_channels, *patches.kernel_size, device=device)
    wanted = nn.Conv3d.forward(patches.double(), pixels.double())
    torch.testing.assert_close(patches.float()(pixels).double(), wanted, rtol=1e-3, atol=1e-3)  # TF32, where it is on
