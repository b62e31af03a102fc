"""CUDA C++ as C++ that g++ compiles: the few things that are not C++ are written differently.

Lines stay where they are, so that messages name those of ``csrc``.
"""

from __future__ import annotations

import re

_SHARED = re.compile(r"__shared__\s+((?:[\w:]+)(?:<[^;<>]*>)?)\s+(\w[^;]*);")
_ASM = re.compile(r"asm\s+volatile\s*\(")
_LAUNCH = re.compile(r"<<<(.*?)>>>\s*\(", re.DOTALL)
_BOUNDS = re.compile(r"__launch_bounds__\s*\(")
_MODULE = "cuda_on_cpu_kernels"


def closing(text: str, opened: int) -> int:
    """Where the bracket that opens at ``opened`` is closed; strings hold no brackets of ours."""
    depth, at, quoted = 0, opened, False
    while at < len(text):
        c = text[at]
        if c == '"' and text[at - 1] != "\\":
            quoted = not quoted
        elif not quoted and c in "([{":
            depth += 1
        elif not quoted and c in ")]}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    raise ValueError(f"no closing bracket for {text[opened : opened + 60]!r}")


def split(text: str, separator: str = ",") -> list[str]:
    """At the separators that are in no bracket and no string."""
    parts, depth, quoted, start = [], 0, False, 0
    for at, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif not quoted and c in "([{<":
            depth += 1
        elif not quoted and c in ")]}>":
            depth -= 1
        elif not quoted and c == separator and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _lines(old: str, new: str) -> str:
    """``new`` on one line, followed by as many line ends as ``old`` had."""
    return " ".join(new.split()) + "\n" * old.count("\n")


def _shared(match: re.Match) -> str:
    type_, out = match[1], []
    for declarator in split(match[2]):
        name, dimensions = re.fullmatch(r"(\w+)\s*((?:\[.*\])?)", declarator, re.DOTALL).groups()
        out.append(
            f"using {name}_type = {type_}{dimensions}; static ::cuda_on_cpu::Variable "
            f'{name}_variable{{"{name}", sizeof({name}_type), alignof({name}_type)}}; '
            f"{name}_type& {name} = *static_cast<{name}_type*>("
            f"::cuda_on_cpu::shared_storage({name}_variable));"
        )
    return _lines(match[0], " ".join(out))


def _asm(text: str) -> str:
    while found := _ASM.search(text):
        end = closing(text, found.end() - 1)
        body = text[found.end() : end]
        template, outputs, inputs = split(body, ":")
        listed = []
        for operands in (outputs, inputs):
            # "+f"(d[0]) -> d[0]
            pairs = re.findall(r'"([=+]?)\w"\((.*)\)$', "\n".join(split(operands)), re.MULTILINE)
            listed.append(", ".join(value for _, value in pairs))
        new = (
            f"::cuda_on_cpu::inline_asm({template}, ::cuda_on_cpu::outputs({listed[0]}), "
            f"{listed[1]})"
        )
        old = text[found.start() : end + 1]
        text = text[: found.start()] + _lines(old, new) + text[end + 1 :]
    return text


def _launches(text: str) -> str:
    while found := _LAUNCH.search(text):
        # The kernel's name and template arguments, back to where the statement begins.
        begin = max(text.rfind(c, 0, found.start()) for c in ";{}:)")
        begin = max(begin, text.rfind("else\n", 0, found.start()) + 3) + 1
        kernel = text[begin : found.start()]
        config = ", ".join(
            part if i != 2 else f"static_cast<std::size_t>({part})"
            for i, part in enumerate(split(found[1]))
        )
        kernel = kernel.strip()
        name = kernel.split("<")[0]
        old = text[begin : found.end()]
        new = f'::cuda_on_cpu::launch("{name}", ::cuda_on_cpu::Config{{{config}}}, {kernel},'
        text = f"{text[:begin]} {_lines(old, new)} {text[found.end() :]}"
    return text


def _bounds(text: str) -> str:
    while found := _BOUNDS.search(text):
        end = closing(text, found.end() - 1)
        bound = text[found.end() : end]
        after = text.index("(", end + 1)
        body = text.index("{", closing(text, after))
        text = (
            text[: found.start()]
            + text[end + 1 : body + 1]
            + f" ::cuda_on_cpu::launch_bounds({bound});"
            + text[body + 1 :]
        )
    return text


def kernels(text: str, name: str) -> str:
    """A file of csrc, ``name`` being what messages call it."""
    text = _SHARED.sub(_shared, text)
    text = _bounds(_launches(_asm(text)))
    return f'#line 1 "{name}"\n{text}'


def bindings(text: str) -> str:
    """Of csrc/bindings.cpp the CUDA entries, as the module of the tests."""
    lines = [
        line
        for line in text.splitlines()
        if "hydra::cpu::" not in line and "cpu/" not in line and "build_info" not in line
    ]
    text = "\n".join(lines).replace("PYBIND11_MODULE(_C, m)", f"PYBIND11_MODULE({_MODULE}, m)")
    end = text.rindex("}")
    return (
        "namespace cuda_on_cpu { void bind(pybind11::module_&); }\n".join(
            [text[: text.index("namespace py")], text[text.index("namespace py") : end]]
        )
        + "  cuda_on_cpu::bind(m);\n}\n"
    )
