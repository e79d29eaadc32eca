"""Lets torchvision's GPU build be imported beside torch's CPU build, and memory be pinned.

torchvision's Python registers fakes of two operators that its library can't define there. What
SGLang keeps of routed experts lies in pinned memory, which only a GPU's driver can give; a CPU
reads any memory. Imported by every interpreter of the test environment as it starts (a `.pth` file
says so), so it does nothing until one of them is asked for.
"""

import contextlib
import functools
import importlib.machinery
import pathlib
import sys

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class TorchvisionOperators:
    """Looks on while modules are found; before torchvision is, its operators are declared."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_operators()


class PinnedMemory:
    """Looks on while modules are found; before the one that pins memory is, torch leaves it out."""

    def find_spec(self, name, path=None, target=None):
        if name == "sglang.srt.state_capturer.base":
            sys.meta_path.remove(self)
            import torch

            zeros = torch.zeros

            @functools.wraps(zeros)
            def pageable(*args, pin_memory=False, **kwargs):
                return zeros(*args, **kwargs)

            torch.zeros = pageable


def declare_operators():
    import torch
    from torch import library as registry

    found = importlib.machinery.PathFinder.find_spec("torchvision")
    if found is None:
        return
    for library in pathlib.Path(found.origin).parent.glob("_C*.so"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(library))
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            registry.define(f"torchvision::{name}", SIGNATURE)


sys.meta_path[:0] = [TorchvisionOperators(), PinnedMemory()]
