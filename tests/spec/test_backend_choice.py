"""``backend="auto"``: only what is recorded or proven, and a warning where something faster is not used.

The proof on a user's own device is in test_proof.py; here none may be started.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels import available_backends
from grpo_kernels.backends import PROVEN, choose, verdicts
from grpo_kernels.types import UnavailableBackendError

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine_with_a_gpu(monkeypatch):
    """A registry that believes in a GPU and in Triton; nothing is launched."""
    registry = __import__("grpo_kernels.backends", fromlist=["backends"])
    plain, triton = (
        SimpleNamespace(unsupported_reason=lambda device, dtype: None, name=n) for n in ("torch", "triton")
    )
    monkeypatch.setattr(registry, "device_kind", lambda device: "nvidia-sm80")
    monkeypatch.setattr(verdicts, "known", lambda name, device: verdicts.UNKNOWN)
    monkeypatch.setenv("GRPO_KERNELS_PROVE", "never")
    monkeypatch.setattr(
        registry, "_unavailable_reason", lambda name: None if name in ("torch", "triton") else "not in this story"
    )
    monkeypatch.setattr(registry, "_load", {"torch": plain, "triton": triton}.__getitem__)
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "PROVEN", {})
    return registry


def test_without_a_recorded_run_a_gpu_gets_plain_pytorch_and_one_warning_that_names_the_way_out(machine_with_a_gpu):
    with pytest.warns(
        UserWarning,
        match="neither a recorded run nor a proof on this device.*backend='triton' takes the kernels unproven",
    ):
        assert choose("auto", GPU, torch.bfloat16).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", GPU, torch.float32).name == "torch"
        assert choose("auto", GPU, torch.bfloat16).name == "torch"


def test_with_a_recorded_run_auto_takes_the_kernels_and_says_nothing(machine_with_a_gpu, monkeypatch):
    monkeypatch.setitem(machine_with_a_gpu.PROVEN, ("triton", "nvidia-sm80"), "a run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", GPU, torch.bfloat16).name == "triton"


def test_a_record_for_another_kind_of_device_proves_nothing_here(machine_with_a_gpu, monkeypatch):
    monkeypatch.setitem(machine_with_a_gpu.PROVEN, ("triton", "amd"), "a run")
    with pytest.warns(UserWarning, match="not 'triton'"):
        assert choose("auto", GPU, torch.bfloat16).name == "torch"


def test_a_backend_asked_for_by_name_is_taken_proven_or_not(machine_with_a_gpu):
    assert choose("triton", GPU, torch.bfloat16).name == "triton"
    with pytest.raises(UnavailableBackendError, match="backend='cuda' cannot be used here: not in this story"):
        choose("cuda", GPU, torch.bfloat16)


def test_float64_and_what_else_the_kernels_lack_falls_to_plain_pytorch():
    assert choose("auto", torch.device("cpu"), torch.float64).__name__.endswith("torch_ops")
    if available_backends()["cpu"] is None and ("cpu", "cpu-x86_64") in PROVEN:
        with pytest.raises(UnavailableBackendError, match="float64"):
            choose("cpu", torch.device("cpu"), torch.float64)
