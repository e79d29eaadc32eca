"""Lets torchvision's GPU build be imported beside torch's CPU build.

Its Python registers fakes of two operators that its library can't define there. Imported by every
interpreter of the test environment as it starts (a `.pth` file says so), so it does nothing until
torchvision is asked for.
"""

import contextlib
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


sys.meta_path.insert(0, TorchvisionOperators())
