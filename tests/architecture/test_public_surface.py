"""What users see: every public name documented, typed, and said to be Robust."""

from __future__ import annotations

import inspect
import typing

import pytest

import grpo_kernels
from grpo_kernels import GroupLossOutput, GroupWeights

FUNCTIONS = [name for name in grpo_kernels.__all__ if inspect.isfunction(getattr(grpo_kernels, name))]
METHODS = [name for name, member in vars(GroupWeights).items() if not name.startswith("_") and callable(member)]


def test_the_names_are_there_and_sorted():
    assert grpo_kernels.__all__ == sorted(grpo_kernels.__all__)
    assert all(hasattr(grpo_kernels, name) for name in grpo_kernels.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_documents_arguments_result_and_errors(name):
    function = getattr(grpo_kernels, name)
    text = inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    sections = ["Returns:"] + ["Args:", "Raises:"] * bool(parameters)
    assert not [section for section in sections if section not in text]
    if "As :func:" not in text:
        assert not [p for p in parameters if p not in text], "an argument is not explained"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_and_result_is_typed(name):
    function = getattr(grpo_kernels, name)
    hints = typing.get_type_hints(function)
    assert set(inspect.signature(function).parameters) | {"return"} <= set(hints)


def test_the_classes_and_their_parts_are_documented():
    assert "Args:" in GroupWeights.__doc__
    assert "Raises:" in GroupWeights.__doc__
    explained = inspect.signature(GroupWeights).parameters
    assert not [name for name in explained if f"{name}:" not in GroupWeights.__doc__]
    inherited = {"get_extra_state", "set_extra_state", "extra_repr"}
    assert not [m for m in METHODS if m not in inherited and not inspect.getdoc(vars(GroupWeights)[m])]
    source = inspect.getsource(GroupLossOutput)
    for field in GroupLossOutput._fields:
        assert f'    {field}: torch.Tensor\n    """(' in source, f"{field} has no shape in its docstring"


def test_the_first_thing_a_newcomer_reads_says_robust_and_not_relative():
    first = grpo_kernels.__doc__.splitlines()[0]
    assert "Robust" in first
    assert "not Group *Relative*" in first


def test_types_are_shipped():
    from pathlib import Path

    assert (Path(grpo_kernels.__file__).parent / "py.typed").exists()


def test_only_the_loss_carries_the_ambiguous_name():
    assert [name for name in grpo_kernels.__all__ if "grpo" in name.lower()] == [
        "fused_grpo_loss",
        "fused_linear_grpo_loss",
    ]
