"""Imports point one way, heavy packages load when first needed, and knowledge stays in the file that owns it."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys

import pytest
from drawing import PAGE, RULE, TRAINER, block, order_of
from imports import (
    FOLDERS,
    PACKAGE,
    PUBLIC,
    ROOT,
    cycles,
    files,
    graph_inside,
    graph_of_files,
    graph_of_places,
    hidden,
    imports_of,
    module_of,
    packages,
    place_in_package,
    place_of,
    places,
    tree_of,
)

FILES = files("grpo_kernels")

EXTENSIONS = {"_cpu", "_cuda"}
"""Built from csrc/; only backends touch them."""

USERS = {
    "trainer": {"types", "arguments"},
    "integrations": {"types", "arguments", "trainer"},
    "proof": {"types", "backends"},
    "cli": {"types", "backends", "trainer", "tune"},
    "experiments": {"trainer"},
    "benchmarks": {"backends", "trainer"},
    "examples": {"integrations"},
}
"""Users of the package, those that happen to live in it included, and what they have besides its public names:
the names of things, the checks of a bad setting, one another, and backends where those are what it is about."""

BACKENDS = {"torch_ops", "triton", "native_cpu", "native_cuda"}
HEAVY = {"triton", "transformers", "trl", "matplotlib", "datasets", "peft", "numpy.f2py", "tensorboard", "jsonargparse"}


def where(path, line=None):
    return str(path.relative_to(ROOT)) + (f":{line}" if line else "")


# ---- the order of the package


def test_every_subpackage_and_module_has_its_place():
    assert set(order_of(RULE)) == {*places(), PUBLIC}, "say in RULE (drawing.py) what may import it, and what it may"


@pytest.mark.parametrize("place", [*places(), PUBLIC])
def test_imports_run_from_a_later_place_of_the_rule_to_an_earlier_one(place):
    allowed = order_of(RULE).get(place, set()) | {place} | (EXTENSIONS if place == "backends" else set())
    wrong = [
        f"{where(path, found.line)} imports {'.'.join(found.name)}"
        for path in FILES if place_of(path) == place
        for found in imports_of(path) if place_in_package(found.name) not in (allowed | {None})
    ]  # fmt: skip
    assert not wrong, f"{place} may import {', '.join(sorted(allowed - {place})) or 'nothing'}:\n" + "\n".join(wrong)


def test_the_rule_is_read_as_it_is_meant():
    order = order_of("a ← {b, c} ← d;  c ← e\n{d, e} ← f")
    assert order == {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"a", "b", "c"}, "e": {"a", "c"}, "f": set("abcde")}
    with pytest.raises(ValueError, match="before themselves"):
        order_of("a ← b ← c; c ← a")
    order, graph = order_of(RULE), graph_of_places()
    assert "loss" in order["head"] & graph["head"]
    assert "head" not in order["loss"]


def test_the_page_has_the_rule():
    text = PAGE.read_text(encoding="utf-8")
    missing = [line for line in [*RULE.splitlines(), *TRAINER.splitlines()] if line not in text]
    assert not missing, f"{where(PAGE)} lacks these lines:\n" + "\n".join(missing)


def test_the_page_has_the_drawing_of_the_code():
    found = block() in PAGE.read_text(encoding="utf-8")
    assert found, f"{where(PAGE)} is old: python tests/architecture/drawing.py --write"


def test_the_trainer_has_an_order_of_its_own():
    order, graph = order_of(TRAINER), graph_inside("trainer")
    assert set(order) == set(graph), "say in TRAINER (drawing.py) where it stands"
    wrong = {name: sorted(graph[name] - order[name]) for name in graph if graph[name] - order[name]}
    assert not wrong


def test_no_two_files_need_each_other():
    found = cycles(graph_of_files())
    assert not found, "\n" + "\n".join(" → ".join([*cycle, cycle[0]]) for cycle in found)


def test_a_cycle_is_found_and_named():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert cycles(graph) == [["a", "b", "c"], ["d", "e"]]
    assert set(graph_of_files()) >= {"tools/gpu_check.py", "benchmarks/report.py", "grpo_kernels/backends/__init__.py"}
    assert "tools/gpu_steps.py" in graph_of_files()["tools/gpu_check.py"]
    assert "grpo_kernels/backends/verdicts.py" in graph_of_files()["grpo_kernels/backends/__init__.py"], "a lazy one"


# ---- names

NAMED_AFTER_OPERATIONS = {("grpo_kernels", "backends", "triton"): {"preference_tail"}}
"""A backend has the functions of the boundary by their names, and its files are named after them, as in csrc/."""


@pytest.mark.parametrize("package", packages(), ids=".".join)
def test_no_name_of_a_package_hides_a_submodule(package):
    source = (ROOT.joinpath(*package) / "__init__.py").read_text(encoding="utf-8")
    taken = hidden(package, source, set(packages()[package])) - NAMED_AFTER_OPERATIONS.get(package, set())
    assert not taken, f"{', '.join(sorted(taken))} of {'.'.join(package)}: a submodule, and a name that hides it"
    seen = submodules_seen()[".".join(package)]
    if isinstance(seen, str):
        pytest.skip(seen)
    wrong = {name: found for name, found in seen.items() if found != "itself"}
    assert set(wrong) == NAMED_AFTER_OPERATIONS.get(package, set()), wrong


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .parts import parts", {"parts"}),
        ("from .other import helper as parts", {"parts"}),
        ("try:\n    import there\nexcept ImportError:\n    parts = None", {"parts"}),
        ("def parts(): ...", {"parts"}),
        ("from . import parts", set()),
        ("from .parts import others\ndef whole():\n    parts = 1", set()),
    ],
)
def test_what_hides_a_submodule_is_noticed(source, found):
    assert hidden(("made", "up"), source, {"parts"}) == found


@functools.cache
def submodules_seen() -> dict:
    """Package → submodule → whether the package's attribute is that module, in a fresh process that imports all.

    A submodule that needs a package which is not installed is left out; so is the whole where the package itself does,
    with the reason in its place.
    """
    code = """
import importlib, json, sys
seen = {}
for package, submodules in json.loads(sys.argv[1]).items():
    try:
        loaded = importlib.import_module(package)
    except ImportError as error:
        seen[package] = str(error)
        continue
    seen[package] = {}
    for name in submodules:
        before = getattr(loaded, name, None)
        try:
            module = importlib.import_module(f"{package}.{name}")
        except ImportError:
            continue
        wrong = [other for other in (before, getattr(loaded, name)) if other not in (None, module)]
        seen[package][name] = repr(wrong[0]) if wrong else "itself"
print(json.dumps(seen))
"""
    return measure(code, json.dumps({".".join(package): names for package, names in packages().items()}))


# ---- who may know what


@pytest.mark.parametrize("user", USERS)
def test_users_of_the_package_use_its_public_names_only(user):
    allowed = USERS[user] | {user, PUBLIC, None}
    for path in files(user) if user in FOLDERS else [path for path in FILES if place_of(path) == user]:
        for found in imports_of(path):
            place = place_in_package(found.name)
            assert place in allowed, f"{where(path, found.line)} imports {'.'.join(found.name)}"


def test_backends_import_types_alone_and_never_each_other():
    for path in FILES:
        module = module_of(path)[1:]
        if module[:1] != ("backends",):
            continue
        reached = [found.name[1:] for found in imports_of(path) if found.name[0] == "grpo_kernels"]
        outside = {name[0] for name in reached} - {"types", "backends"} - EXTENSIONS
        assert not outside, f"{where(path)} imports {outside}"
        others = {name[1] for name in reached if name[0] == "backends" and len(name) > 1} & BACKENDS
        assert len(module) == 1 or not others - {module[1]}, f"{where(path)} imports {others}"


@pytest.mark.parametrize("subpackage", ["loss", "head", "groups", "vocab", "backends"])
def test_a_subpackage_says_what_it_is_for(subpackage):
    text = ast.get_docstring(tree_of(PACKAGE / subpackage / "__init__.py")) or ""
    assert len([line for line in text.splitlines() if line]) >= 3, f"{subpackage}/__init__.py: what is it, for whom?"


def test_only_distributed_py_talks_to_torch_distributed():
    """That of the package, and the trainer's."""
    for path in FILES:
        talks = any(found.name[:2] == ("torch", "distributed") for found in imports_of(path))
        uses = any(
            ast.unparse(n) == "torch.distributed" for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute)
        )
        assert not (talks or uses) or path.name == "distributed.py", where(path)


def test_only_autograd_py_of_the_loss_and_of_the_head_knows_ctx():
    for path in FILES:
        nodes = list(ast.walk(tree_of(path)))
        names = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
        assert "ctx" not in names or module_of(path)[1:] in {("loss", "autograd"), ("head", "autograd")}, where(path)


def test_there_are_five_autograd_functions_and_no_more():
    """One a step that has a gradient of its own; every other way of combining them is composition."""
    found = [
        (where(path), node.name)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases)
    ]
    assert {file for file, _ in found} == {"grpo_kernels/loss/autograd.py", "grpo_kernels/head/autograd.py"}
    assert len(found) <= 5, found


COMPUTE = ("loss/pairs", "loss/autograd", "loss/functional", "loss/ops", "head/functional", "head/autograd", "head/ops",
           "head/linear_head", "head/target", "head/plan", "vocab/parallel")  # fmt: skip


@pytest.mark.parametrize("name", COMPUTE)
def test_what_computes_checks_no_argument(name):
    """Arguments are refused where they are read; vocab/parallel.py refuses what ranks have told one another."""
    raised = {
        ast.unparse(node.exc.func)
        for node in ast.walk(tree_of(PACKAGE / f"{name}.py"))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    assert not raised & {"TypeError", "ValueError"} or name == "vocab/parallel"


@pytest.mark.parametrize("path", FILES, ids=where)
def test_no_file_is_too_long_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


# ---- what an import costs


def measure(code: str, *arguments: str) -> dict:
    """Runs code that prints one JSON object, in a fresh interpreter that sees this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy_and_takes_no_time():
    code = (
        "import json, sys, time; import torch; import torch.distributed; before = set(sys.modules);"
        "start = time.process_time(); import grpo_kernels; seconds = time.process_time() - start;"
        "print(json.dumps({'seconds': seconds, 'loaded': sorted(set(sys.modules) - before)}))"
    )
    result = measure(code)
    roots = {name.split(".")[0] for name in result["loaded"]}
    assert not roots & HEAVY
    of_backends = {name for name in result["loaded"] if name.startswith("grpo_kernels.backends.")}
    assert of_backends == {"grpo_kernels.backends.boundary"}
    assert result["seconds"] < 0.5  # of processor time, so that a busy machine does not fail it
