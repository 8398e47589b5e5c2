"""Twenty steps of each objective log what was recorded: a change of numbers is seen, whether it is meant or not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from test_golden import GOLDEN, compare, make


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", make.CURVES)
def test_twenty_steps_are_as_recorded(name, tmp_path):
    stored = json.loads((GOLDEN / "curves" / f"{name}.json").read_text())
    log = make.run_curve(name, tmp_path / "run")
    assert [line["step"] for line in log] == list(range(20))
    compare(log, stored["log"], stored["environment"])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_comparison_notices_small_changes(elsewhere):
    stored = json.loads((GOLDEN / "curves" / "poa_tiny.json").read_text())
    here = make.environment()
    recorded = {**here, "cpu": "another"} if elsewhere else here
    allowed, refused = (5e-4, 2e-3) if elsewhere else (5e-7, 2e-6)
    for factor, passes in ((1 + allowed, True), (1 + refused, False)):
        changed = copy.deepcopy(stored["log"])
        changed[7]["loss"] *= factor
        if passes:
            compare(changed, stored["log"], recorded)
        else:
            with pytest.raises(AssertionError, match=r"step 7: loss .* else 1e-3"):
                compare(changed, stored["log"], recorded)
    del changed[7]["loss"]
    with pytest.raises(AssertionError, match="step 7: other quantities"):
        compare(changed, stored["log"], recorded)


def test_every_recipe_that_is_meant_for_tests_has_a_curve():
    from okavango.recipes import VERBS, recipes

    tiny = {name for verb in VERBS for name in recipes(verb) if name.endswith("_tiny")}
    assert tiny <= set(make.CURVES)
    assert {path.stem for path in (GOLDEN / "curves").glob("*.json")} == set(make.CURVES)
