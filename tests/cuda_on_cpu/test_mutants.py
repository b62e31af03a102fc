"""The mistakes in mutants.py are still mistakes in what csrc has now."""

import pytest

from tests.cuda_on_cpu import build, mutants, translate


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.what)
def test_the_place_is_there(mutant):
    assert mutants.broken(mutant) != (build.ROOT / "csrc" / mutant.file).read_text()


def test_translation_keeps_lines():
    for path in (build.ROOT / "csrc" / "cuda").iterdir():
        lines = path.read_text().split("\n")
        translated = translate.kernels(path.read_text(), path.name).split("\n")[1:]
        assert len(lines) == len(translated)
        for old, new in zip(lines, translated, strict=True):
            if old.startswith(("//", "#", "}", "template", "struct", "constexpr", "inline")):
                assert old == new
