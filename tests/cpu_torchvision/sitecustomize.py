"""Lets PyPI's torchvision be imported beside a CPU build of torch: on PYTHONPATH of the tests that need torchvision.

PyPI's torchvision is a CUDA build. Without CUDA its library of operators does not load, and then its Python part fails
at import, because it gives meta kernels to operators that were never declared. So they are declared before it is
imported. None of them is implemented: a model that needs one still fails, by name. Resizing needs none.
"""

import importlib.abc
import sys

TENSORS_AND_SCALE = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
SCHEMAS = (
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({TENSORS_AND_SCALE}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({TENSORS_AND_SCALE}) -> (Tensor, Tensor)",
    f"ps_roi_align({TENSORS_AND_SCALE}, int sampling_ratio) -> (Tensor, Tensor)",
    f"ps_roi_pool({TENSORS_AND_SCALE}) -> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
)


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators at the first look for torchvision."""

    def __init__(self):
        self.library = None

    def find_spec(self, name, path=None, target=None):
        """Return None: the ordinary finders go on."""
        if name == "torchvision" and self.library is None:
            import torch

            if torch.version.cuda:  # its own library declares them
                return None
            self.library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                self.library.define(schema)
        return None


sys.meta_path.insert(0, BeforeTorchvision())
