"""What gets installed: sdist, wheels of each HYDRA_BUILD, pins, and how setup.py finds CUDA."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement

from hydra_kernels.backends import extension

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def run(*command, cwd=ROOT, **changes):
    env = {**os.environ, **changes}
    env.pop("PYTHONPATH", None)
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)  # noqa: S202  made by the line above
    (tree,) = [path for path in folder.iterdir() if path.is_dir()]
    return tree


def build_wheel(tree: Path, mode: str, folder: Path) -> Path:
    """Builds from ``tree``; returns the wheel, unpacked in ``folder``/site beside it."""
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)),
        cwd=tree,
        HYDRA_BUILD=mode,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return wheel


def python(site: Path, code: str, **changes) -> str:
    """Runs ``code`` against the unpacked wheel, from a folder that has none of our sources."""
    # An editable install's finder offers its own _C where the wheel has none.
    isolate = "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]"
    code = f"import sys; {isolate}; sys.path.insert(0, {str(site)!r})\n{code}"
    return run(sys.executable, "-c", code, cwd=site, **changes)


LOSS = """
import torch, hydra_kernels
from hydra_kernels.backends import extension
assert hydra_kernels.__file__.startswith(sys.path[0]), hydra_kernels.__file__
torch.manual_seed(0)
x = [torch.randn(4, 100) for _ in range(6)]
arguments = dict(old_logprobs=x[2], old_values=x[3], advantages=x[4], returns=x[5],
                 mask=torch.rand(4, 100) < 0.7)
def loss(backend):
    return hydra_kernels.ppo_loss(x[0], x[1], **arguments, backend=backend).loss
"""


def test_sdist_builds_a_cpu_wheel_that_works(unpacked_sdist, tmp_path):
    wheel = build_wheel(unpacked_sdist, "cpu", tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.match(r"hydra_kernels/_C\..*\.so$", name) for name in names), names
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
    assert not [n for n in names if n.startswith(("csrc", "tests", "benchmarks", "scripts"))]
    code = LOSS + (
        "assert extension.module is not None, extension.why_not\n"
        "assert not extension.module.build_info()['cuda']\n"
        "torch.testing.assert_close(loss('cpu'), loss('reference'))\n"
    )
    python(tmp_path / "site", code)


@pytest.fixture(scope="module")
def wheel_without_extension(unpacked_sdist, tmp_path_factory):
    return build_wheel(unpacked_sdist, "none", tmp_path_factory.mktemp("none"))


def test_wheel_without_extension_works(wheel_without_extension):
    assert wheel_without_extension.name.endswith("-py3-none-any.whl")
    code = LOSS + (
        "assert extension.module is None\n"
        "assert 'HYDRA_BUILD=none' in extension.missing()[0]\n"
        "assert torch.isfinite(loss(None))\n"
        "try:\n    loss('cpu')\n"
        "except NotImplementedError as error:\n    print(error)\n"
    )
    assert "HYDRA_BUILD=none" in python(wheel_without_extension.parent / "site", code)


def test_wheel_holds_every_module_and_the_bundled_data(wheel_without_extension):
    packed = set(zipfile.ZipFile(wheel_without_extension).namelist())
    sources = [
        str(path.relative_to(ROOT))
        for package in ("hydra_kernels", "hydra_rlhf")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in (".py", ".json", ".jsonl", ".typed", ".md")
    ]
    assert len(sources) > 10
    assert set(sources) <= packed, set(sources) - packed


def test_building_without_extension_leaves_an_editable_install_alone():
    before = sorted(ROOT.glob("hydra_kernels/_C.*"))
    run(sys.executable, "setup.py", "--version", HYDRA_BUILD="none")
    assert sorted(ROOT.glob("hydra_kernels/_C.*")) == before


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module, with its call to setup() switched off."""
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "HYDRA_BUILD", "HYDRA_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("hydra_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_bin(tmp_path, monkeypatch):
    """Makes the PATH one folder, to which the returned function adds programs that print."""

    def add(name: str, prints: str) -> str:
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
        program.chmod(0o755)
        return str(program)

    monkeypatch.setenv("PATH", str(tmp_path))
    return add


def test_unknown_build_mode_is_an_error():
    command = [sys.executable, "setup.py", "--version"]
    env = {**os.environ, "HYDRA_BUILD": "gpu"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert "HYDRA_BUILD must be one of auto, cpu, cuda, none, got 'gpu'" in result.stderr


def test_cuda_without_a_compiler_is_an_error(setup_py, monkeypatch):
    monkeypatch.setenv("HYDRA_BUILD", "cuda")
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="no CUDA compiler in CUDACXX, CUDA_HOME, PATH"):
        setup_py.CMakeBuild(setuptools.Distribution()).run()


def test_nvcc_is_found_by_variable_before_path(setup_py, fake_bin, tmp_path, monkeypatch):
    on_path = fake_bin("nvcc", "")
    assert setup_py.find_nvcc() == on_path
    (tmp_path / "home" / "bin").mkdir(parents=True)
    in_home = fake_bin("home/bin/nvcc", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.find_nvcc() == in_home
    named = fake_bin("my-nvcc", "")
    monkeypatch.setenv("CUDACXX", named)
    assert setup_py.find_nvcc() == named
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with pytest.raises(SystemExit, match="names /nowhere/nvcc: no such compiler"):
        setup_py.find_nvcc()


def test_without_a_cpp_compiler_the_extension_is_left_out_and_that_is_said(
    setup_py, fake_bin, monkeypatch, capsys
):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("HYDRA_BUILD", "auto")  # PATH is an empty folder
    assert setup_py.extensions() == []
    assert "no C++ compiler in CXX or PATH" in capsys.readouterr().out
    for mode in ("cpu", "cuda"):
        monkeypatch.setenv("HYDRA_BUILD", mode)
        with pytest.raises(SystemExit, match=f"HYDRA_BUILD={mode}: no C.. compiler in CXX or PATH"):
            setup_py.extensions()
    monkeypatch.setenv("HYDRA_BUILD", "none")
    assert setup_py.extensions() == [] and capsys.readouterr().out == ""
    monkeypatch.setenv("HYDRA_BUILD", "auto")
    monkeypatch.setenv("CXX", "/nowhere/clang++ -stdlib=libc++")
    with pytest.raises(SystemExit, match=re.escape("CXX names /nowhere/clang++: no such compiler")):
        setup_py.extensions()
    monkeypatch.delenv("CXX")
    fake_bin("clang++", "")
    assert len(setup_py.extensions()) == 1 and capsys.readouterr().out == ""


KNOWN = "compute_80\\ncompute_86\\ncompute_89\\ncompute_90\\ncompute_100\\n"


def test_archs_follow_the_machine_and_the_variable(setup_py, fake_bin, monkeypatch):
    nvcc = fake_bin("nvcc", KNOWN)
    assert setup_py.cuda_archs(nvcc) == ["80", "90a"]  # no nvidia-smi here
    fake_bin("nvidia-smi", "9.0\\n9.0\\n8.6\\n")
    assert setup_py.cuda_archs(nvcc) == ["86", "90a"]
    monkeypatch.setenv("HYDRA_CUDA_ARCHS", "80;89")
    assert setup_py.cuda_archs(nvcc) == ["80", "89"]
    monkeypatch.setenv("HYDRA_CUDA_ARCHS", "release")  # less 120, which this nvcc does not know
    assert setup_py.cuda_archs(nvcc) == ["80", "86", "89", "90a", "100"]
    monkeypatch.setenv("HYDRA_CUDA_ARCHS", "70")
    with pytest.raises(SystemExit, match="does not know '70'"):
        setup_py.cuda_archs(nvcc)


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [
        ("12.1\\n", ["100"]),  # newer than nvcc: the PTX of its newest
        ("10.3\\n9.0\\n", ["100", "90a"]),
        ("6.1\\n", ["80", "90a"]),  # older than all it knows: as on a machine without a GPU
        ("6.1\\n8.6\\n", ["86"]),
    ],
)
def test_a_gpu_that_nvcc_does_not_know_stops_no_install(setup_py, fake_bin, gpus, archs, capsys):
    nvcc = fake_bin("nvcc", KNOWN)
    fake_bin("nvidia-smi", gpus)
    assert setup_py.cuda_archs(nvcc) == archs
    assert "nvcc does not know sm_" in capsys.readouterr().out


def test_every_dependency_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ranges = [Requirement(line) for line in project["build-system"]["requires"]]
    ranges += map(Requirement, project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        ranges += map(Requirement, extra)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for python_version in ("3.10", "3.13"):
        here = {"python_version": python_version, "platform_machine": "x86_64"}
        pinned = {
            pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==")
            for pin in pins
            if pin.marker is None or pin.marker.evaluate(here)
        }
        for wanted in ranges:
            name = wanted.name.lower().replace("_", "-")
            assert name in pinned, f"constraints.txt lacks {name}"
            assert wanted.specifier.contains(pinned[name]), f"{wanted} and =={pinned[name]}"


needs_extension = pytest.mark.skipif(
    extension.module is None, reason=f"needs a compiler at install: {extension.why_not}"
)


@needs_extension
def test_an_extension_of_other_sources_is_not_called(tmp_path):
    """Its entries may take other arguments, where a checkout was updated and not built."""
    info = extension.module.build_info()
    assert not extension.is_stale(info, tmp_path)  # installed: no sources to compare with
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert not extension.is_stale(info, tmp_path)
    assert extension.is_stale({}, tmp_path)  # from before there was such a check
    with open(tmp_path / "csrc" / "cpu" / "entries.h", "a") as file:
        file.write("int another_entry();\n")
    assert extension.is_stale(info, tmp_path)


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_process_has_one_openmp_runtime():
    code = (
        "import torch, hydra_kernels\n"
        "from hydra_kernels.backends import extension\n"
        "assert extension.module.build_info()['openmp']\n"
        "x = torch.randn(64, 512)\n"
        "hydra_kernels.ppo_loss(x, x, old_logprobs=x, old_values=x, advantages=x, returns=x,\n"
        "                       mask=x > 0, backend='cpu')\n"
        "(x @ x.T).sum()\n"
        "print(open('/proc/self/maps').read())\n"
    )
    mapped = run(sys.executable, "-c", code, OMP_NUM_THREADS="2")
    paths = set(re.findall(r"/\S*/lib(?:gomp|iomp|omp)\S*\.so\S*", mapped))
    assert len(paths) == 1, paths


@needs_extension
@pytest.mark.parametrize("level", ["baseline", "v3"])
def test_vector_levels_agree(level):
    machine = extension.module.build_info()["machine_isa"]
    if level == "v3" and machine == "baseline":
        pytest.skip("needs a CPU with AVX2")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        + LOSS
        + "torch.testing.assert_close(loss('cpu'), loss('reference'))\n"
        + "print(extension.module.build_info()['cpu_isa'])"
    )
    code = code.replace("assert hydra_kernels.__file__", "0 and hydra_kernels.__file__")
    assert run(sys.executable, "-c", code, HYDRA_CPU_ISA=level).strip() == level


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_entry_says_why_it_cannot_run():
    if not extension.module.build_info()["cuda"]:
        assert not hasattr(extension.module, "device_name_cuda")
        return
    with pytest.raises(RuntimeError, match=r"device_name: CUDA error: .* \(cudaError\w+\)"):
        extension.module.device_name_cuda(0)
