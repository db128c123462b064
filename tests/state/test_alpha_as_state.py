"""Alpha is state like an optimizer's: saved, loaded, moved and copied without losing a bit or a name."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_close
from torch import nn

from grpo_kernels import GroupWeights

SIZES = {"a": 5, "b": 3, "c": 2}


def moved(sizes=SIZES, **options):
    """A module that has taken two steps and has something pending."""
    gw = GroupWeights.robust(sizes, 0.01, **options)
    for losses in ([1.0, 2.0, 3.0], [0.5, 0.1, 4.0], [7.0, 8.0, 9.0]):
        values = torch.tensor(losses)
        gw.observe(values, torch.tensor([1, 2, 3]), values)
        if losses[0] != 7.0:
            gw.step()
    return gw


def continued(gw):
    """What alpha becomes when what is pending is stepped on."""
    gw.step()
    return gw.log_alpha


def test_state_dict_carries_alpha_names_counters_and_what_is_pending():
    state = moved().state_dict()
    assert set(state) == {"log_alpha", "pending", "num_updates", "num_skipped", "_extra_state"}
    assert state["_extra_state"] == {"names": ["a", "b", "c"]}
    assert state["log_alpha"].dtype == torch.float64


def test_a_saved_state_loads_without_executing_code_and_goes_on_bit_for_bit():
    gw, file = moved(), io.BytesIO()
    torch.save(gw.state_dict(), file)
    file.seek(0)
    other = GroupWeights.robust(SIZES, 0.01)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.log_alpha, gw.log_alpha)
    assert int(other.num_updates) == 2
    assert torch.equal(continued(other), continued(gw))


def test_loading_into_permuted_groups_carries_weights_by_name():
    gw, permuted = moved(), GroupWeights.robust({"c": 2, "a": 5, "b": 3}, 0.01)
    permuted.load_state_dict(gw.state_dict())
    assert torch.equal(permuted.weights, gw.weights[[2, 0, 1]])
    # The order of a sum over groups differs by roundings.
    assert_close(continued(permuted), continued(gw)[[2, 0, 1]])


@pytest.mark.parametrize(
    "sizes", [{"a": 5, "b": 3, "d": 2}, {"a": 5, "b": 3}, {"a": 5, "b": 3, "c": 2, "d": 1}, [5, 3, 2]]
)
def test_loading_other_groups_is_refused_and_changes_nothing(sizes):
    other = GroupWeights.robust(sizes, 0.01)
    before = other.log_alpha.clone()
    with pytest.raises(ValueError, match=r"groups \['a', 'b', 'c'\]"):
        other.load_state_dict(moved().state_dict())
    assert torch.equal(other.log_alpha, before)


def test_a_state_without_names_is_refused():
    state = moved().state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="_extra_state"):
        GroupWeights.robust(SIZES, 0.01).load_state_dict(state)


def test_it_is_saved_with_the_model_it_belongs_to():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "weights": moved()})
    twin = nn.ModuleDict({"layer": nn.Linear(2, 2), "weights": GroupWeights.robust({"b": 3, "a": 5, "c": 2}, 0.01)})
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin["weights"].weights, model["weights"].weights[[1, 0, 2]])
    assert not list(model["weights"].parameters())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_change_of_dtype_does_not_reach_alpha(cast):
    gw = moved()
    before = gw.log_alpha.clone()
    model = getattr(nn.ModuleDict({"layer": nn.Linear(2, 2), "weights": gw}), cast)()
    assert model["weights"].log_alpha.dtype == torch.float64
    assert torch.equal(model["weights"].log_alpha, before)
    assert gw.num_updates.dtype == torch.int64


def test_a_move_reaches_every_buffer():
    gw = moved().to("meta", dtype=torch.bfloat16)
    assert {(b.device.type, b.dtype) for b in gw.buffers()} == {("meta", torch.float64), ("meta", torch.int64)}


def test_a_copy_is_its_own():
    gw = moved()
    twin = copy.deepcopy(gw)
    continued(twin)
    assert not torch.equal(twin.log_alpha, gw.log_alpha)
    assert torch.equal(continued(gw), twin.log_alpha)


def test_it_survives_pickling():
    gw = moved()
    twin = pickle.loads(pickle.dumps(gw))
    assert twin.names == gw.names
    assert torch.equal(continued(twin), continued(gw))


def test_a_state_dict_is_not_changed_by_loading_it():
    state = moved().state_dict()
    before = state["log_alpha"].clone()
    GroupWeights.robust({"c": 2, "a": 5, "b": 3}, 0.01).load_state_dict(state)
    assert torch.equal(state["log_alpha"], before)


def test_a_float32_state_cannot_turn_alpha_into_float32():
    state = moved().state_dict()
    state["log_alpha"] = state["log_alpha"].float()
    for assign in (False, True):
        gw = GroupWeights.robust(SIZES, 0.01)
        gw.load_state_dict(state, assign=assign)
        assert gw.log_alpha.dtype == torch.float64
