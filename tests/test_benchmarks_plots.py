"""Plots are of the records and nothing else."""

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra 'plot'")

from benchmarks import harness, plots
from benchmarks.harness import Record

WHERE = dict(device="A processor, 2 cores", threads=2, commit="abc1234", date="2026-11-22")


def timed(backend, M, ms, **rest):
    return Record("lora_linear", "fwd", backend, {"M": M, "R": 16}, "float32", ms=ms,
                  ms_p20=0.9 * ms, ms_p80=1.2 * ms, **WHERE, **rest)  # fmt: skip


def peaked(backend, V, mib):
    return Record("linear_logprob", "fwd", backend, {"M": 8, "V": V}, "float32", ms=1.0,
                  ms_p20=1.0, ms_p80=1.0, peak_mib=mib, **WHERE)  # fmt: skip


def method(name, **figures):
    return Record("ppo_methods", name, "hydra_rlhf", {"B": 8, "P": 4, "T": 4}, "float32",
                  figures=figures, **WHERE)  # fmt: skip


TIMES = [timed(b, M, M * us * 1e-3) for b, us in (("cpu", 10.0), ("peft", 12.5))
         for M in (1024, 512)]  # fmt: skip


def curve(ax, colour):
    (line,) = [line for line in ax.lines if line.get_color() == colour]
    return list(line.get_xdata()), list(line.get_ydata())


def test_time_per_token():
    figure = plots.time_against_tokens(TIMES, "lora_linear")
    (ax,) = figure.axes
    x, y = curve(ax, plots.OURS["cpu"])
    assert x == [512, 1024] and y == pytest.approx([10.0, 10.0])
    assert {t.get_text() for t in ax.texts} == {"cpu", "peft"}
    assert "abc1234" in figure._supxlabel.get_text()


def test_names_of_close_lines_do_not_overlap():
    rows = [timed(f"peer {i}", M, M * 0.01 * (1 + 1e-3 * i)) for i in range(9) for M in (512, 1024)]
    (ax,) = plots.time_against_tokens(rows, "lora_linear").axes
    at = sorted(t.xy[1] for t in ax.texts)
    assert len(at) == 9 and at[-1] <= 1.0 + 1e-9
    assert min(b - a for a, b in zip(at, at[1:], strict=False)) > 0.06


def test_memory_against_vocabulary():
    rows = [peaked("cpu", V, 60.0) for V in (50, 90)] + [peaked("eager", V, V) for V in (50, 90)]
    (ax,) = plots.memory_against_vocabulary(rows).axes
    assert curve(ax, plots.PEERS[0]) == ([50, 90], [50, 90])
    assert curve(ax, plots.OURS["cpu"])[1] == [60, 60]


def test_methods_stand_in_the_papers_order():
    rows = [
        method("hydra-ppo", s_per_sample=1.0, peak_gib=20.0, held_gib=10.0, planned_gib=25.0),
        method("lora-ppo, same memory", s_per_sample=9.0, peak_gib=90.0),
        method("lora-ppo", s_per_sample=3.0, peak_gib=40.0, held_gib=30.0),
    ]
    memory, seconds = plots.ppo_methods(rows).axes
    assert [t.get_text() for t in memory.get_yticklabels()] == ["lora-ppo", "hydra-ppo"]
    assert [bar.get_width() for bar in memory.patches] == [40.0, 20.0, 30.0, 10.0]
    assert [bar.get_width() for bar in seconds.patches] == [3.0, 1.0]
    assert [line.get_xdata()[0] for line in memory.lines] == [25.0]


def test_methods_without_memory_have_one_panel():
    assert len(plots.ppo_methods([method("ppo", s_per_sample=1.0)]).axes) == 1


def test_only_the_last_right_measurement_counts():
    old, new = timed("cpu", 512, 1.0), timed("cpu", 512, 2.0)
    failed = replace(new, status="failed", ms=None)
    assert plots.latest([old, new, failed]) == [new]


def test_files_are_made_and_what_is_not_is_said(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    for record in TIMES:
        harness.write(record, results)
    assert plots.main([str(results), "--out", str(tmp_path / "plots")]) == 0
    made = tmp_path / "plots" / "time_lora_linear.png"
    assert made.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert said.out.strip() == str(made)
    assert "no memory.png" in said.err and "no ppo_methods.png" in said.err
