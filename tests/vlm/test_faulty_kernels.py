"""Ways around faults of cuDNN: what replaces them computes the same."""

import copy

import pytest
import torch
from tiny import write_vlm
from torch import nn

from pipeline.vlm.backbone import load_vlm
from pipeline.vlm.faulty_kernels import PatchConv3d, avoid_faulty_kernels, patch_products


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_convolution_of_single_patches(bias):
    conv = nn.Conv3d(3, 10, (2, 5, 5), (2, 5, 5), bias=bias, dtype=torch.float64)
    patches = torch.randn(7, 3, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    wanted, found = conv(patches), patch_products(conv, patches)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted)
    slopes = torch.randn_like(wanted)
    inputs = [patches, *conv.parameters()]
    ours, theirs = (torch.autograd.grad(out, inputs, slopes) for out in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_only_a_conv3d_over_single_patches_changes():
    convs = [nn.Conv3d(3, 4, 2, 2), nn.Conv3d(3, 4, 2, 1), nn.Conv3d(3, 4, 2, 2, padding=1), nn.Conv2d(3, 4, 2, 2)]
    avoid_faulty_kernels(nn.ModuleList(convs))
    assert [type(conv) for conv in convs] == [PatchConv3d, nn.Conv3d, nn.Conv3d, nn.Conv2d]
    several = torch.randn(1, 3, 4, 4, 4)  # eight patches a row: as before
    torch.testing.assert_close(convs[0](several), nn.Conv3d.forward(convs[0], several), rtol=0, atol=0)


def test_a_loaded_model_has_it_and_keeps_its_names(tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    model = load_vlm(write_vlm(tmp_path / "model", "qwen2_vl", 2, 32), torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    (name,) = [name for name, module in model.named_modules() if type(module) is PatchConv3d]
    assert f"{name}.weight" in model.state_dict()
    assert type(copy.deepcopy(model).get_submodule(name)) is PatchConv3d
