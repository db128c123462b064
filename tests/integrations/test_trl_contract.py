"""What of TRL is relied on beyond its documentation: where this fails, TRL has changed and so must the integration."""

from __future__ import annotations

import inspect
import re

import pytest
from trl_runs import DPOTrainer, GroupRobustDPOTrainer

from grpo_kernels.integrations.trl import contract
from grpo_kernels.integrations.trl.groups import GROUP_IDS
from grpo_kernels.integrations.trl.trainer import NOT_OF_THE_MODEL


def test_the_installed_trl_is_the_one_this_was_written_for():
    assert contract.broken_promises() == []


def test_every_method_that_is_overridden_is_in_the_list():
    inherited = {name for base in GroupRobustDPOTrainer.__mro__[1:] for name in vars(base)} - {"__doc__", "__module__"}
    own = {name for name, member in vars(GroupRobustDPOTrainer).items() if inspect.isfunction(member)}
    assert own & inherited == {*contract.METHODS, "__init__"}


@pytest.mark.parametrize("name", contract.METHODS)
def test_an_override_takes_what_it_overrides_takes(name):
    assert tuple(inspect.signature(getattr(GroupRobustDPOTrainer, name)).parameters) == contract.METHODS[name]


def test_the_trainer_is_made_as_trl_makes_its_own():
    assert tuple(inspect.signature(GroupRobustDPOTrainer.__init__).parameters) == contract.INIT


@pytest.mark.parametrize("method", ["_compute_loss", "compute_ref_log_probs"])
def test_no_key_of_a_batch_is_kept_from_the_model_by_trl_alone(method):
    # It is a local in both, so a key that TRL adds can only be seen in the text.
    source = inspect.getsource(getattr(DPOTrainer, method))
    written = re.search(r"_non_model_keys = \{([^}]*)\}", source)
    assert set(re.findall(r'"(\w+)"', written[1])) == NOT_OF_THE_MODEL - {GROUP_IDS}


def test_a_trl_that_changed_is_refused_with_the_names_of_what_changed(monkeypatch):
    monkeypatch.delattr(DPOTrainer, "_compute_loss")
    monkeypatch.setattr(DPOTrainer, "log", lambda self, logs: None)
    with pytest.raises(ImportError, match=r"does not fit trl [\d.]+(.|\n)*_compute_loss(.|\n)*DPOTrainer.log"):
        contract.check_contract()
