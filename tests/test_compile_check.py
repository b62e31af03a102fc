"""scripts/compile_check.py finds what it is there for: spills, missing code, forgotten kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "compile_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compile_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_80'
ptxas info    : Function properties for _Z1fPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 292 bytes smem, 480 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90a'
ptxas info    : Function properties for _Z1gPf
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 24 bytes cumulative stack size
"""


def test_ptxas_report_is_read(script):
    good, spilled = script.ptxas_rows(REPORT)
    assert (good.kernel, good.arch) == ("_Z1fPf", "80")
    assert (good.registers, good.spill_bytes, good.shared_bytes) == (62, 0, 292)
    assert good.judge((), None).errors == []
    assert (spilled.kernel, spilled.arch) == ("_Z1gPf", "90a")
    assert (spilled.registers, spilled.spill_bytes, spilled.stack_bytes) == (255, 36, 24)
    assert spilled.judge((), None).errors == ["spills 36 bytes"]


@pytest.mark.parametrize(
    "line, feature",
    [
        ("/*0090*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;", "wide_loads"),
        ("/*0090*/  LDG.E.EF.128.CONSTANT R4, desc[UR4][R2.64] ;", "wide_loads"),
        ("/*0090*/  LDGSTS.E.BYPASS.128 [R7], desc[UR8][R4.64] ;", "wide_loads"),
        ("/*0090*/  UTMALDG.2D [UR8], [UR6] ;", "wide_loads"),
        ("/*0090*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;", "tensor_cores"),
        ("/*0090*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;", "tensor_cores"),
        ("/*0090*/  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;", "tensor_cores"),
        ("/*0090*/  LDG.E.64 R4, desc[UR4][R2.64] ;", None),
        ("/*0090*/  FFMA R4, R8, R12, R4 ;", None),
    ],
)
def test_features_are_recognised(script, line, feature):
    assert script.count_features(line) == ({feature: 1} if feature else {})


def test_occupancy_by_hand(script):
    # 128 registers: 4096 a warp, 16 warps; in blocks of 4 warps, 4 blocks
    assert script.occupancy(128, 0, 4, 90) == 16 / 64
    # 100 KB a block: two fit in 228 KB, one in 164 KB
    assert script.occupancy(32, 100 * 1024, 8, 90) == 16 / 64
    assert script.occupancy(32, 100 * 1024, 8, 80) == 8 / 64
    # 32 registers, no memory: all 64 warps; blocks of one warp stop at 32 blocks
    assert script.occupancy(32, 0, 4, 90) == 1.0
    assert script.occupancy(32, 0, 1, 90) == 0.5


ELF = """
arch = sm_80
.nv.info._Z1fPf
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x2 0x1
.nv.info._Z1gPf
\tAttribute:\tEIATTR_REGCOUNT
\tFormat:\tEIFMT_SVAL
\tValue:\t0x3 0x20
arch = sm_90a
.nv.info._Z1gPf
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x20 0x1 0x1
"""


def test_block_sizes_are_read(script):
    # g has no launch bounds on sm_80; another attribute's value is not one
    assert script.parse_block_sizes(ELF) == {("_Z1fPf", "80"): 256, ("_Z1gPf", "90a"): 32}


@pytest.mark.parametrize(
    "pattern, meant",
    [
        ("gae_fwd_kernel", True),
        ("gae_fwd_kernel<*, true>", True),
        ("gae_fwd_kernel<256, *, true>", True),
        ("gae_fwd_kernel<*, false>", False),
        ("gae_fwd", False),
    ],
)
def test_a_comment_means_the_instantiations_that_it_fits(script, pattern, meant):
    assert script.fits(pattern, "gae_fwd_kernel", "gae_fwd_kernel<256, false, true>") is meant


KERNELS = """
import triton
import triton.language as tl


@triton.jit
def add_one_fwd_kernel(x, out, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offs, tl.load(x + offs, mask=offs < size) + 1.0, mask=offs < size)


@triton.jit
def hold_much_fwd_kernel(x, out, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    held = tl.load(x + offs)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(4):
        total += tl.sort(held + i)
    tl.store(out + offs, held + total)


@triton.jit
def widen_fwd_kernel(x, size):
    tl.store(x, (size.to(tl.int64) * size).to(tl.float32))


@triton.jit
def forgotten_fwd_kernel(x):
    tl.store(x, 0.0)


def aot_signatures():
    x, size = {"x": "*fp32:16", "out": "*fp32:16"}, {"size": "i32:16"}
    block = {"BLOCK": 1024}
    expects = {"expects": ("wide_loads",)}
    yield add_one_fwd_kernel, {**x, **size}, block, {"label": "good", **expects}
    narrow = {"x": "*fp32", "out": "*fp32", "size": "i32"}
    yield add_one_fwd_kernel, narrow, block, {"label": "narrow", **expects}
    yield add_one_fwd_kernel, x, block, {"label": "incomplete"}
    yield widen_fwd_kernel, {"x": "*fp32", "size": "i32"}, {}, {"label": "of many"}
    yield hold_much_fwd_kernel, x, {"BLOCK": 4096}, {"label": "spills", "maxnreg": 32}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton's compiler, which is Linux's")
def test_triton_kernels_are_compiled_and_judged(tmp_path):
    (tmp_path / "sample.py").write_text(KERNELS)
    code = f"""
import sys, pathlib
sys.path[:0] = [{str(tmp_path)!r}, {str(SCRIPT.parent)!r}]
import compile_check, sample
compile_check.OUT = pathlib.Path({str(ROOT)!r}) / "build" / "compile-check-test"
compile_check.triton_modules = lambda: [sample]
jobs, rows = compile_check.triton_jobs((90,), "")
for row in rows + [compile_check.compile_triton(job) for job in jobs]:
    print(row.kernel, row.variant, "|", "; ".join(row.errors))
"""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "MAX_JOBS": "1"}
    env.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line.split(" | ") for line in result.stdout.splitlines()]
    errors = {name.strip(): rest for name, rest in lines}
    assert errors["forgotten_fwd_kernel"] == "not in an aot_signatures()"
    assert errors["add_one_fwd_kernel good"] == ""
    assert errors["add_one_fwd_kernel narrow"] == "no wide loads"
    assert "neither signature nor constexprs has size" in errors["add_one_fwd_kernel incomplete"]
    assert errors["widen_fwd_kernel of many"] == ""
    assert "does not compile" in errors["widen_fwd_kernel sizes of 1"]  # an int has no .to
    assert errors["add_one_fwd_kernel sizes of 1"] == ""
    assert errors["hold_much_fwd_kernel spills"].startswith("spills ")
