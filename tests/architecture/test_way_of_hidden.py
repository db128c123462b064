"""The way of hidden states from the public function to the kernel: few files, and none of them twice."""

from __future__ import annotations

import itertools
import sys

import torch

from grpo_kernels import fused_linear_grpo_loss
from grpo_kernels.backends import torch_ops

MOST_MODULES = 8
"""How many a reader may have to open who follows one call, the kernel's own included."""


def test_a_reader_of_one_call_opens_few_files_and_none_twice(monkeypatch):
    ways = []
    kernel = torch_ops.head_tile_fwd

    def recording(*arguments, **options):
        ways.append([*modules_on_the_stack(), kernel.__module__])
        return kernel(*arguments, **options)

    monkeypatch.setattr(torch_ops, "head_tile_fwd", recording)
    hidden = torch.randn(4, 3, 8, requires_grad=True)
    weight = torch.randn(16, 8, requires_grad=True)
    labels = torch.randint(16, (4, 3))
    groups, weights = torch.tensor([0, 1]), torch.full((2,), 0.5)
    fused_linear_grpo_loss(hidden, weight, labels, None, groups, weights, backend="torch")
    assert ways, "the kernel was not called"
    for way in ways:
        assert way[0] == fused_linear_grpo_loss.__module__
        assert len(way) <= MOST_MODULES, " → ".join(way)
        assert len(way) == len(set(way)), "there and back: " + " → ".join(way)


def modules_on_the_stack() -> list[str]:
    """The package's modules among the callers, the outermost first; consecutive ones of one name once."""
    frame, names = sys._getframe(2), []
    while frame is not None:
        names.append(frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    ours = [name for name in reversed(names) if name.split(".")[0] == "grpo_kernels"]
    return [name for name, _ in itertools.groupby(ours)]
