"""Imports run one way, backends <- ops <- nn, peft <- hydra_rlhf; csrc knows nothing of Torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hydra_kernels", "hydra_rlhf")
MAY_IMPORT = {  # room -> the rooms of this project it may import
    "hydra_kernels": {
        "hydra_kernels",
        "hydra_kernels.backends",
        "hydra_kernels.ops",
        "hydra_kernels.nn",
        "hydra_kernels.peft",
        "hydra_kernels.replay",
    },
    "hydra_kernels.backends": {"hydra_kernels.backends", "hydra_kernels._C"},
    "hydra_kernels.ops": {"hydra_kernels.ops", "hydra_kernels.backends"},
    "hydra_kernels.nn": {"hydra_kernels.nn", "hydra_kernels.ops"},
    "hydra_kernels.peft": {"hydra_kernels.peft", "hydra_kernels.nn", "hydra_kernels.ops"},
    "hydra_kernels.replay": {"hydra_kernels.replay", "hydra_kernels.backends"},
    "hydra_rlhf": {
        "hydra_rlhf",
        "hydra_kernels",
        "hydra_kernels.ops",
        "hydra_kernels.nn",
        "hydra_kernels.peft",
        "hydra_kernels.replay",
    },
}
ROOMS = {*MAY_IMPORT, "hydra_kernels._C"}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_INCLUDE = {  # room -> the folders of csrc it may include from
    "include": {"hydra"},
    "cpu": {"hydra", "cpu"},
    "cuda": {"hydra", "cuda"},
    ".": {"hydra", "cpu", "cuda", "."},  # the bindings
}
CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
TORCH = ("torch/", "ATen/", "c10/", "caffe2/")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The longest room that the module is in."""
    inside = [room for room in ROOMS if f"{module}.".startswith(f"{room}.")]
    return max(inside, key=len)


def imports(source: str):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "use absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_imports(module: str, source: str) -> list[str]:
    allowed = MAY_IMPORT[room_of(module)]
    ours = [name for name in imports(source) if name.split(".")[0] in PACKAGES]
    return [name for name in ours if room_of(name) not in allowed]


def includes(source: str):
    for line in source.splitlines():
        words = line.strip().replace("#include", "#include ").split()
        if words[:1] == ["#include"]:
            yield words[1].strip('<">')


def forbidden_includes(path: Path, source: str) -> list[str]:
    room = path.relative_to(ROOT / "csrc").parts[0]
    allowed = MAY_INCLUDE.get(room, MAY_INCLUDE["."])
    found = []
    for name in includes(source):
        folder = name.split("/")[0]
        ours = folder in ("hydra", "cpu", "cuda") and "/" in name
        if name.startswith(TORCH) or (ours and folder not in allowed):
            found.append(name)
        if name.startswith("pybind11/") and room in ("include", "cpu", "cuda"):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path):
    assert forbidden_imports(module_name(path), path.read_text()) == []


@pytest.mark.parametrize("path", CSRC, ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_csrc_includes_run_one_way_and_no_torch(path):
    assert forbidden_includes(path, path.read_text()) == []


@pytest.mark.parametrize(
    "module, line",
    [
        ("hydra_kernels.ops.gae", "from hydra_kernels.nn import LMHead"),
        ("hydra_kernels.ops.gae", "from hydra_kernels import peft"),
        ("hydra_kernels.nn.lm_head", "from hydra_kernels.backends import registry"),
        ("hydra_kernels.backends.cpu.gae", "import hydra_kernels.ops.gae"),
        ("hydra_rlhf.ppo", "import hydra_kernels._C"),
        ("hydra_rlhf.ppo", "from hydra_kernels.backends.registry import select"),
        ("hydra_kernels.peft", "def f():\n    import hydra_rlhf.model"),
    ],
)
def test_a_wrong_import_is_found(module, line):
    assert forbidden_imports(module, line)


@pytest.mark.parametrize(
    "file, line",
    [
        ("cuda/gae.cu", "#include <torch/extension.h>"),
        ("bindings.cpp", '#include "ATen/ATen.h"'),
        ("cpu/gae.cpp", '#include "cuda/check.h"'),
        ("include/hydra/gae.h", '#include "cpu/multiversion.h"'),
        ("cpu/gae.cpp", "#include <pybind11/pybind11.h>"),
    ],
)
def test_a_wrong_include_is_found(file, line):
    assert forbidden_includes(ROOT / "csrc" / file, line)
