"""Compiles every CUDA and Triton kernel for GPUs that need not be here, and looks at the result.

    python scripts/compile_check.py [--only cuda|triton] [--arch 80 --arch 90] [--match linear]

CUDA: builds the extension for sm_80 and sm_90a, reads ptxas's report of each kernel, imports the
extension and, where there is no GPU, expects a CUDA entry to raise a clear error. Needs nvcc.

Triton: compiles what each module below hydra_kernels.backends.triton names, for sm_80, sm_90 and
sm_100. Each kernel is named by one, which has a function

    def aot_signatures():
        yield kernel, signature, constexprs, options

    kernel: the function under @triton.jit.
    signature: {argument: type} of the arguments that are not constexpr. Types are Triton's:
        "*fp32", "*bf16", "*i1", "i32", "i64", "fp32". "*fp32:16" and "i32:16" promise divisibility
        by 16, as a launch finds in a whole tensor's address and in most sizes; wide loads need it.
        A type of None is an argument that is None.
    constexprs: {argument: value}.
    options: num_warps, num_stages and other options of triton.compile, and three of this script:
        label: what sets this variant apart in the table, e.g. "bf16 BLOCK_V=128".
        archs: the architectures it is for, default (80, 90, 100).
        expects: features that its machine code must have, see FEATURES.

The variants are those that run: each tuned configuration, each dtype that takes another path; and,
of each kernel once, that in which every integer is 1, since a launch compiles those in as constants
(a Python int, which has no .to). A kernel in CUDA names its features in a comment of its source,
`// SASS expects: <kernel>: <feature>, <feature>`, or `// SASS expects: <kernel><template
arguments>: ...` for those instantiations of it that the pattern fits, `*` standing for anything.

A failure to compile, a register spill, more shared memory than the architecture has, or a missing
feature is an error, and the exit status is 1. "warps" is the share of a multiprocessor's warps that
registers and shared memory leave room for (CUDA: at the kernel's launch bounds, without the shared
memory that a launch asks for). The table is also in build/compile-check/report.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "compile-check"
CUDA_ARCHS = "80;90a"
TRITON_ARCHS = (80, 90, 100)
# Shared memory that one block may ask for, in bytes: CUDA C++ Programming Guide, table of technical
# specifications per compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Of one multiprocessor, from the same table; the same on all three but for the shared memory.
SM_REGISTERS, SM_WARPS, SM_BLOCKS = 64 * 1024, 64, 32
SM_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
FEATURES = {
    # a 16-byte load by one thread, straight, through cp.async, or a bulk copy by the copy engine
    "wide_loads": re.compile(r"\b(LDG\.E(\.\w+)*\.128|LDGSTS\.E(\.\w+)*\.128|UTMALDG|UBLKCP)"),
    # mma.sync; Hopper's wgmma; Blackwell's tcgen05
    "tensor_cores": re.compile(r"\b(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b"),
}
ONES = "sizes of 1"
LOCAL_MEMORY = re.compile(r"\b(STL|LDL)\b")


@dataclass
class Row:
    """What one kernel became on one architecture."""

    language: str
    kernel: str
    variant: str
    arch: str
    registers: int = 0
    spill_bytes: int = 0  # CUDA: as ptxas reports; Triton: 4 for each local load or store
    stack_bytes: int = 0
    shared_bytes: int = 0
    occupancy: float | None = None  # warps that fit on a multiprocessor, of 64
    features: dict[str, int] = field(default_factory=dict)  # occurrences in the machine code
    errors: list[str] = field(default_factory=list)

    def judge(self, expects: tuple[str, ...], shared_limit: int | None) -> Row:
        if self.spill_bytes:
            self.errors.append(f"spills {self.spill_bytes} bytes")
        if shared_limit is not None and self.shared_bytes > shared_limit:
            self.errors.append(f"shared memory {self.shared_bytes} > {shared_limit}")
        for feature in expects:
            if not self.features.get(feature):
                self.errors.append(f"no {feature.replace('_', ' ')}")
        return self


def find_tool(name: str) -> str | None:
    """One of the CUDA binary utilities: Triton's package brings them, the toolkit may too."""
    try:
        import triton
    except ImportError:
        return shutil.which(name)
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else shutil.which(name)


def disassemble(path: Path) -> dict[tuple[str, str], str]:
    """(kernel, architecture) to SASS, of a cubin or of a library with cubins inside."""
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        raise RuntimeError("no cuobjdump: it comes with the triton package and the CUDA toolkit")
    text = subprocess.run(
        [cuobjdump, "-sass", str(path)], check=True, capture_output=True, text=True
    ).stdout
    found: dict[tuple[str, str], list[str]] = {}
    arch, lines = "", []
    for line in text.splitlines():
        if heading := re.match(r"\s*(?:arch = |code for )sm_(\w+)", line):
            arch = heading[1]
        elif heading := re.match(r"\s*Function : (\S+)", line):
            lines = found.setdefault((heading[1], arch), [])
        else:
            lines.append(line)
    return {key: "\n".join(lines) for key, lines in found.items()}


def block_sizes(path: Path) -> dict[tuple[str, str], int]:
    """(kernel, architecture) to the threads of a block that its launch bounds allow."""
    tool = find_tool("cuobjdump")
    assert tool is not None, "disassemble() has found it"
    text = subprocess.run([tool, "-elf", str(path)], check=True, capture_output=True, text=True)
    return parse_block_sizes(text.stdout)


def parse_block_sizes(text: str) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    arch = kernel = ""
    expected = False
    for line in text.splitlines():
        if heading := re.match(r"\s*(?:arch = |code for )sm_(\w+)", line):
            arch = heading[1]
        elif heading := re.match(r"\.nv\.info\.(\S+)", line):
            kernel = heading[1]
        elif "EIATTR_MAX_THREADS" in line:
            expected = True
        elif expected and (value := re.match(r"\s*Value:((?:\s+0x[0-9a-f]+)+)", line)):
            x, y, z = (int(size, 16) for size in value[1].split())
            found[kernel, arch] = x * y * z
            expected = False
    return found


def fits(pattern: str, kernel: str, instance: str) -> bool:
    """Whether a SASS expects comment means this instantiation of a kernel."""
    return fnmatch.fnmatchcase(instance if "<" in pattern else kernel, pattern)


def count_features(sass: str) -> dict[str, int]:
    counts = {name: len(pattern.findall(sass)) for name, pattern in FEATURES.items()}
    return {name: count for name, count in counts.items() if count}


def occupancy(registers: int, shared: int, num_warps: int, arch: int) -> float:
    """Share of a multiprocessor's warps that are resident, as far as registers and memory allow."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out in units of 256
    by_registers = SM_REGISTERS // max(per_warp, 1) // num_warps
    by_shared = SM_SHARED[arch] // (shared + 1024)  # each block has 1 KB that the system keeps
    blocks = min(SM_BLOCKS, SM_WARPS // num_warps, by_registers, by_shared)
    return blocks * num_warps / SM_WARPS


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **changes}


def check_cuda() -> list[Row]:
    library = OUT / "lib"
    shutil.rmtree(library, ignore_errors=True)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(library)],
        check=True,
        cwd=ROOT,
        env=environment(HYDRA_BUILD="cuda", HYDRA_CUDA_ARCHS=CUDA_ARCHS),
    )
    (extension,) = library.glob("hydra_kernels/_C.*")
    call_cuda_entry(extension)

    name = "-".join([str(sys.implementation.cache_tag), "cuda", *CUDA_ARCHS.split(";")])
    objects = ROOT / "build" / name / "CMakeFiles" / "_C.dir"
    rows = []
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        report = objects / "csrc" / "cuda" / f"{source.name}.o.ptxas"
        rows += ptxas_rows(report.read_text())
    expects = cuda_expectations()
    mangled = [row.kernel for row in rows]
    found: set[str] = set()
    sass, threads = disassemble(extension), block_sizes(extension)
    for row, plain in zip(rows, demangle(mangled), strict=True):
        row.features = count_features(sass.get((row.kernel, row.arch), ""))
        if block := threads.get((row.kernel, row.arch)):
            arch = int(re.sub(r"\D", "", row.arch))
            row.occupancy = occupancy(row.registers, row.shared_bytes, block // 32, arch)
        base = re.sub(r"<.*", "", plain.split("(")[0]).split("::")[-1].split(" ")[-1]
        row.variant = template_arguments(plain)
        row.kernel = base
        instance = f"{base}<{row.variant}>"
        names = [name for name in expects if fits(name, base, instance)]
        row.judge(tuple(feature for name in names for feature in expects[name]), None)
        found.update(names)
    for kernel in sorted(set(expects) - found):
        errors = ["a SASS expects comment names it, and there is no such kernel"]
        rows.append(Row("cuda", kernel, "", "", errors=errors))
    return rows


def ptxas_rows(report: str) -> list[Row]:
    rows: list[Row] = []
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            rows.append(Row("cuda", entry[1], "", entry[2]))
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            if rows:
                rows[-1].stack_bytes = int(frame[1])
                rows[-1].spill_bytes = int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            rows[-1].registers = int(used[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                rows[-1].shared_bytes = int(shared[1])
    return rows


def cuda_expectations() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for path in [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cuh")]:
        for kernel, names in re.findall(
            r"// SASS expects: (\w+(?:<.*>)?): ([\w, ]+)", path.read_text()
        ):
            features = tuple(name.strip() for name in names.split(","))
            if unknown := set(features) - set(FEATURES):
                raise SystemExit(f"{path}: no such feature {unknown}, known: {list(FEATURES)}")
            found[kernel] = features
    return found


def demangle(names: list[str]) -> list[str]:
    if not names or shutil.which("c++filt") is None:
        return names
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    return text.split("\n")[: len(names)]


def template_arguments(name: str) -> str:
    found = re.search(r"<(.*)>\(", name)
    return found[1].replace("(bool)1", "true").replace("(bool)0", "false") if found else ""


def call_cuda_entry(extension: Path) -> None:
    """In a process of its own: the extension imports, and says so when there is no GPU."""
    code = f"""
import importlib.util, sys, torch
sys.modules["hydra_kernels._C"] = None  # not the one built in place, where there is one
from hydra_kernels.backends import extension
extension.share_openmp()
spec = importlib.util.spec_from_file_location("hydra_kernels._C", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["cuda"], module.build_info()
try:
    print("a CUDA entry runs on", module.device_name_cuda(0))
except RuntimeError as error:
    assert not torch.cuda.is_available(), error
    assert "device_name: CUDA error" in str(error), error
    print("imports without a GPU; a CUDA entry raises:", error)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@dataclass(frozen=True)
class Job:
    module: str
    index: int
    arch: int
    ones: bool = False  # every integer argument is 1


def triton_modules() -> list[ModuleType]:
    from hydra_kernels.backends import triton as package

    names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return [importlib.import_module(name) for name in names]


def own_kernels(module: ModuleType) -> list:
    """The @triton.jit kernels defined there; a device function has no store of its own."""
    from triton.runtime import JITFunction

    functions = [f.fn for f in vars(module).values() if isinstance(f, JITFunction)]
    here = [f for f in functions if f.__module__ == module.__name__]
    return [f for f in here if f.__name__.endswith("_kernel")]


def triton_jobs(archs: tuple[int, ...], match: str) -> tuple[list[Job], list[Row]]:
    jobs, problems = [], []
    modules, named, as_ones = triton_modules(), set(), set()
    for module in modules:
        signatures = module.aot_signatures() if hasattr(module, "aot_signatures") else ()
        for index, (kernel, _, _, options) in enumerate(signatures):
            wanted = [arch for arch in archs if arch in options.get("archs", TRITON_ARCHS)]
            if kernel.fn not in as_ones and wanted and match in f"{kernel.fn.__name__} {ONES}":
                jobs.append(Job(module.__name__, index, wanted[-1], ones=True))
                as_ones.add(kernel.fn)
            named.add(kernel.fn)
            if match in f"{kernel.fn.__name__} {options.get('label', '')}":
                jobs += [Job(module.__name__, index, arch) for arch in wanted]
    for kernel in (k for module in modules for k in own_kernels(module)):
        if kernel not in named:
            errors = ["not in an aot_signatures()"]
            problems.append(Row("triton", kernel.__name__, "", "", errors=errors))
    return jobs, problems


def compile_triton(job: Job) -> Row:
    module = importlib.import_module(job.module)
    kernel, signature, constexprs, options = list(module.aot_signatures())[job.index]
    options = dict(options)
    label = options.pop("label", "")
    expects = tuple(options.pop("expects", ()))
    options.pop("archs", None)
    if job.ones:
        ints = [name for name, kind in signature.items() if kind and kind[:3] in ("i32", "i64")]
        signature = {name: kind for name, kind in signature.items() if name not in ints}
        constexprs = {**constexprs, **dict.fromkeys(ints, 1)}
        label, expects = ONES, ()
    row = Row("triton", kernel.fn.__name__, label, str(job.arch))
    if unknown := set(expects) - set(FEATURES):
        row.errors.append(f"no such feature {unknown}, known: {list(FEATURES)}")
        return row
    try:
        cubin, shared, num_warps = build_triton(kernel, signature, constexprs, options, job.arch)
    except Exception as error:
        (OUT / "errors").mkdir(parents=True, exist_ok=True)
        log = OUT / "errors" / f"{row.kernel}-{job.index}{'-ones' * job.ones}-sm{job.arch}.txt"
        log.write_text(traceback.format_exc())
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        row.errors.append(f"does not compile: {last[:120]} (see {log.relative_to(ROOT)})")
        return row
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = "\n".join(disassemble(Path(file.name)).values())
        usage = resource_usage(Path(file.name))
    row.registers, row.stack_bytes = usage["REG"], usage["STACK"]
    row.shared_bytes = shared
    # Triton has no arrays in local memory: what goes there was spilled. With sizes of 1 no address
    # is known to be aligned: every element has one of its own, and for a call so small they may.
    row.spill_bytes = 0 if job.ones else 4 * len(LOCAL_MEMORY.findall(sass))
    row.features = count_features(sass)
    row.occupancy = occupancy(row.registers, shared, num_warps, job.arch)
    return row.judge(expects, SHARED_LIMIT[job.arch])


def build_triton(kernel, signature, constexprs, options, arch: int) -> tuple[bytes, int, int]:
    """The machine code; of one block, the shared memory in bytes and the number of warps."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    if missing := [name for name in kernel.arg_names if name not in given]:
        raise ValueError(f"neither signature nor constexprs has {', '.join(missing)}")
    constants, types, attrs = dict(constexprs), {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = given[name]
        if kind is None:
            kind, constants[name] = "constexpr", None
        kind, _, multiple = kind.partition(":")
        types[name] = kind
        if multiple == "16":
            attrs[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps


def resource_usage(cubin: Path) -> Counter[str]:
    cuobjdump = find_tool("cuobjdump")
    assert cuobjdump is not None
    text = subprocess.run(
        [cuobjdump, "-res-usage", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    return Counter({key: int(n) for key, n in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)})


def check_triton(archs: tuple[int, ...], match: str) -> list[Row]:
    jobs, rows = triton_jobs(archs, match)
    workers = int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, max(len(jobs) // 4, 1)))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        return rows + list(pool.map(compile_triton, jobs))


def table(rows: list[Row]) -> str:
    lines = [
        ("", "kernel", "variant", "arch", "regs", "spill", "smem", "warps", "machine code", "")
    ]
    for row in rows:
        features = ", ".join(f"{name} {count}" for name, count in row.features.items())
        resident = "" if row.occupancy is None else f"{row.occupancy:.0%}"
        numbers = (str(row.registers), str(row.spill_bytes), str(row.shared_bytes), resident)
        state = "FAILED: " + "; ".join(row.errors) if row.errors else "ok"
        lines.append((row.language, row.kernel, row.variant, row.arch, *numbers, features, state))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = (
        "  ".join(
            cell.rjust(width) if 4 <= i <= 7 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    return "\n".join(aligned)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("cuda", "triton"))
    parser.add_argument("--arch", type=int, choices=TRITON_ARCHS, action="append", help="Triton")
    parser.add_argument("--match", default="", help="Triton: kernels whose name or label has this")
    arguments = parser.parse_args()
    shutil.rmtree(OUT / "errors", ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)

    rows, skipped = [], []
    if arguments.only != "triton":
        if shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"):
            rows += check_cuda()
        else:
            skipped.append("CUDA: no nvcc on this machine")
    if arguments.only != "cuda":
        if importlib.util.find_spec("triton") is not None:
            rows += check_triton(tuple(arguments.arch or TRITON_ARCHS), arguments.match)
        else:
            skipped.append("Triton: not installed")

    (OUT / "report.json").write_text(
        json.dumps({"rows": [asdict(row) for row in rows], "skipped": skipped}, indent=1) + "\n"
    )
    print(table(rows))
    for reason in skipped:
        print("not checked:", reason)
    failed = sum(bool(row.errors) for row in rows)
    print(f"{len(rows)} kernel builds, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    # The interpreter replaces the compiler where this is set, in this process and its workers.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(OUT / "triton"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
