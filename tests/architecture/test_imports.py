"""Imports point one way, heavy packages load when first needed, and knowledge stays in the file that owns it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "grpo_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "types": set(),
    "reference": {"types"},
    "distributed": set(),
    "backends": {"types", "_cpu", "_cuda"},  # the built extensions, which no one else may touch
    "checks": {"types", "backends"},
    "ops": {"backends"},
    "vocab_shards": {"types", "checks", "distributed"},
    "linear_plan": {"backends", "vocab_shards"},
    "vocab_parallel": {"checks", "backends", "distributed", "vocab_shards", "linear_plan"},
    "linear_head": {"types", "checks", "backends", "distributed", "ops", "linear_plan", "vocab_parallel"},
    "linear_ops": {"types", "backends", "linear_plan", "linear_head", "vocab_shards"},
    "autograd": {"types", "backends", "distributed", "ops", "linear_plan", "linear_ops"},
    "group_checks": {"checks"},
    "group_weights": {"types", "checks", "group_checks", "distributed"},
    "functional": {
        "types",
        "checks",
        "backends",
        "ops",
        "linear_head",
        "autograd",
        "group_weights",
        "vocab_shards",
        "vocab_parallel",
    },
    "functional_linear": {
        "types",
        "checks",
        "ops",
        "linear_plan",
        "linear_ops",
        "autograd",
        "functional",
        "group_weights",
        "vocab_shards",
    },
    "fused_head": {"types", "checks", "distributed", "functional_linear"},
    "tune": {"types", "backends", "proof", "linear_plan", "functional", "functional_linear"},
}
"""The core, module by module: what each may import from this package.  The list is the order of the house."""

PUBLIC_ONLY = {"trainer", "integrations", "cli", "proof"}
"""Users of the package that happen to live in it: they have its public names, and one another."""

COMMANDS = {"tune"}
"""Packages that implement commands; only the command line imports them."""

SHARED_WORDS = {"types", "checks"}
"""What they share with the core besides: the names of things, and how a bad setting is refused."""

BACKENDS = {"torch_ops", "triton", "native_cpu", "native_cuda"}
HEAVY = {"triton", "transformers", "trl", "matplotlib", "datasets", "peft", "numpy.f2py", "tensorboard", "jsonargparse"}


def module_of(path: Path) -> tuple[str, ...]:
    """``grpo_kernels/backends/torch_ops.py`` → ("backends", "torch_ops")."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path, top_level_only: bool = False) -> list[tuple[str, ...]]:
    """Every module a file imports, absolute: ("grpo_kernels", "types"), ("torch", "distributed")."""
    tree = ast.parse(path.read_text())
    here = ("grpo_kernels", *path.relative_to(PACKAGE).parent.parts) if path.is_relative_to(PACKAGE) else ()
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from . import x` and `from .x import y` both name x; `from torch import distributed` names it too.
            found += [(*base, alias.name) for alias in node.names]
    return found


def own_imports(path: Path) -> list[tuple[str, ...]]:
    return [name[1:] for name in imports_of(path) if name[0] == "grpo_kernels" and len(name) > 1]


def test_every_module_of_the_core_has_its_place():
    core = {module_of(path)[0] for path in FILES if module_of(path)}
    assert core <= set(MAY_IMPORT) | PUBLIC_ONLY | {"__main__"}, "a new module: say in MAY_IMPORT what it may import"


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_point_one_way(module):
    for path in FILES:
        if module_of(path)[:1] == (module,):
            reached = {name[0] for name in own_imports(path)} - {module}
            assert reached <= MAY_IMPORT[module], f"{path.relative_to(ROOT)} imports {reached - MAY_IMPORT[module]}"


def test_the_order_has_no_cycle():
    placed: set[str] = set()
    while len(placed) < len(MAY_IMPORT):
        ready = {m for m, below in MAY_IMPORT.items() if m not in placed and below & set(MAY_IMPORT) <= placed}
        assert ready, f"cycle among {set(MAY_IMPORT) - placed}"
        placed |= ready


def test_backends_do_not_import_each_other():
    for path in FILES:
        module = module_of(path)
        if len(module) >= 2 and module[0] == "backends":
            others = {name[1] for name in own_imports(path) if name[0] == "backends" and len(name) > 1}
            assert not (others & BACKENDS) - {module[1]}, path


def public_names() -> set[str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    return set(ast.literal_eval(values[0])) | {"__version__"}


def test_users_of_the_package_use_its_public_names_only():
    inside = [path for path in FILES if module_of(path) and module_of(path)[0] in PUBLIC_ONLY]
    outside = [p for folder in ("experiments", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
    for path in inside + outside:
        allowed = public_names() | PUBLIC_ONLY | (SHARED_WORDS if path in inside else set())
        if path in inside and module_of(path)[0] == "cli":
            allowed |= COMMANDS
        reached = {name[0] for name in own_imports(path)} - allowed
        assert not reached, f"{path.relative_to(ROOT)} imports {reached}"


def test_only_one_file_talks_to_torch_distributed():
    for path in FILES:
        talks = any(name[:2] == ("torch", "distributed") for name in imports_of(path))
        uses = "torch.distributed" in {
            ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
        }
        assert not (talks or uses) or path.name == "distributed.py", path


def test_only_one_file_knows_ctx():
    for path in FILES:
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        names |= {n.arg for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.arg)}
        assert "ctx" not in names or path.name == "autograd.py", path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_too_long_to_read(path):
    assert len(path.read_text().splitlines()) <= 450


def measure(code: str) -> dict:
    """Runs code that prints one JSON object, in a fresh interpreter that sees this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
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
    assert not {name for name in result["loaded"] if name.startswith("grpo_kernels.backends.")}
    assert result["seconds"] < 0.5  # of processor time, so that a busy machine does not fail it
