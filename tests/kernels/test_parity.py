"""One matrix, backend x operation x dtype x shape x layout, against float64 and within an error budget.

The cases are those of ``grpo_kernels.proof``, which recorded runs and the proof on a user's device take too.
"""

import pytest
from kernel_cases import case_id, every_case, places

from grpo_kernels.backends import OPERATIONS
from grpo_kernels.proof import cases, rows, tail, tiles


@pytest.mark.parametrize(("place", "case"), every_case(), ids=case_id)
def test_parity(place, case):
    case.run()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("place", places(), ids=case_id)
def test_every_operation_and_dtype_of_the_boundary_has_a_case(place, quick):
    found = cases(place, quick=quick)
    assert {name for case in found for name in case.operations} >= set(OPERATIONS)
    for source in (rows, tail, tiles):
        for dtype in tail.DTYPES[:1] if source is tail else place.dtypes:
            of_dtype = [c for c in found if c.operations[0] in source.OPERATIONS and str(dtype)[6:] in c.name]
            assert of_dtype, f"no case of {source.OPERATIONS} for {dtype}"
    names = [(case.operations, case.name) for case in found]
    assert len(names) == len(set(names)), "two cases have one name"


def test_an_operation_without_a_case_is_an_error(monkeypatch):
    """A new function of the boundary cannot be forgotten by the proof."""
    place = places()[0]
    monkeypatch.setitem(OPERATIONS, "unheard_of", "something new")
    monkeypatch.setattr(place.module, "unheard_of", lambda: None, raising=False)
    with pytest.raises(RuntimeError, match="no case for unheard_of"):
        cases(place)
