"""Tables are of the records and nothing else, and the page's are those of the committed ones."""

import pytest

from benchmarks import alignment_report as report
from benchmarks.alignment_report import ORDER, TABLES, Results, fill, markdown
from benchmarks.alignment_study import ARMS, BY_NAME, REWARD_MODEL, read
from benchmarks.machine import ROOT

PAGE = ROOT / "docs" / "alignment_study.md"
RECORDS = sorted((ROOT / "benchmarks" / "results" / "alignment").glob("*.jsonl"))


def record(arm, seed, **figures):
    """Gold rewards of two prompts that rise with the arm's place; the seed's parity swaps them."""
    gold = [0.1 * list(BY_NAME).index(arm), 0.5]
    return {
        "kind": "arm",
        "arm": arm,
        "seed": seed,
        "scores": gold[:: 1 - 2 * (seed % 2)],
        "gold": sum(gold) / 2,
        "kl": 1.5,
        "reward": 0.5 * seed,
        "accuracy": 0.8 if arm in ("Hydra-SFT", REWARD_MODEL) else None,
        "tokens": 12.0,
        "distinct_2": 0.25,
        "static_bytes": 2_500_000,
        "curves": {
            "score": [0.0, 1.0],
            "kl": [0.0, 2.0],
            "entropy": [1.0, 0.5],
            "value_loss": [0.4, 0.2 + seed / 10],
            "explained_variance": [0.1, 0.3],
        },
        "versions": {"torch": "2"},
        "device": "A processor",
        "threads": 1,
        "commit": "abc1234",
        "date": "2026-11-22",
        **figures,
    }


@pytest.fixture
def records():
    return [record(arm.name, seed) for arm in ARMS for seed in (0, 1)]


def cells(table, row):
    head, *rows = table
    (found,) = [one for one in rows if one[0] == row]
    return dict(zip(head, found, strict=True))


def test_comparison_by_hand(records):
    """Every arm after SFT beats it on one prompt of two and ties on the other: 75%."""
    timing = {"kind": "timing", "arm": "Hydra-PPO", "seed": 0, "s_per_sample": 0.0125}
    table = report.comparison(Results([*records, timing]))
    ours = cells(table, "Hydra-PPO")
    assert ours["win rate vs SFT [95%]"].startswith("75.0% [")
    assert ours["by seed"] == "75 75"
    assert ours["RM accuracy"] == "0.800"
    assert ours["static MB"] == "2.5" and ours["ms a sample"] == "12.5"
    assert ours["paper, GPT-4"] == "55.52"
    # Hydra-PPO is after SFT, Hydra-SFT and J-Hydra-PPO, and before LoRA-PPO.
    assert ours["mean win rate vs the others"] == f"{(75 + 75 + 75 + 25) / 4:.1f}"
    assert cells(table, "Start")["win rate vs SFT [95%]"].startswith("25.0%")
    assert cells(table, "SFT")["win rate vs SFT [95%]"] == "-"
    assert cells(table, "LoRA-SFT")["ms a sample"] == "-"


def test_intervals_widen_with_the_seeds_disagreement(records):
    for one in records:
        if one["arm"] == "Hydra-PPO":
            one["scores"] = [1.0, 1.0] if one["seed"] else [0.0, 0.0]
    ours = cells(report.comparison(Results(records)), "Hydra-PPO")
    assert ours["win rate vs SFT [95%]"] == "50.0% [0.0, 100.0]"
    assert ours["by seed"] == "0 100"


def test_remedies_are_paired_with_the_joint_adapter_as_it_is(records):
    table = report.remedies(Results(records))
    assert [row[0] for row in table[1:]] == [
        report.JOINT,
        *(arm.name for arm in ARMS if arm.group == "remedy"),
        report.HYDRA,
    ]
    ours = cells(table, report.HYDRA)  # the next in ARMS: 0.1 more on one prompt of two
    assert ours[f"less {report.JOINT}'s [95%]"].startswith("+0.050 [")
    assert ours["by seed"] == "+0.050 +0.050"
    # Means of (0.4, 0.2) and (0.4, 0.3).
    assert ours["value loss, steps 1-5"] == "0.325 (0.300 to 0.350)"
    assert ours["explained variance, last 10"] == "0.20"


def test_a_seed_that_lacks_an_arm_is_left_out(records):
    without = [r for r in records if (r["arm"], r["seed"]) != ("DPO", 1)]
    assert Results(without).seeds == [0]
    remedy = next(arm.name for arm in ARMS if arm.group == "remedy")
    without = [r for r in records if (r["arm"], r["seed"]) != (remedy, 1)]
    found = Results(without)
    assert found.seeds == [0, 1] and remedy not in found.arms


def test_the_page_is_filled_between_its_marks(records):
    page = "".join(f"before {name}\n<!-- {name} -->\nold\n<!-- end -->\n" for name in TABLES)
    made = fill(page, Results(records))
    assert "\nold\n" not in made and made.count("before") == len(TABLES)
    assert markdown(report.matrix(Results(records))) in made
    assert fill(made, Results(records)) == made
    with pytest.raises(ValueError, match="no place for the table critics"):
        fill(page.replace("<!-- critics -->", ""), Results(records))


def test_the_picture_has_every_arm_and_step(records, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib, of the extra 'plot'")
    report.draw(Results(records), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_page_is_that_of_the_committed_records():
    results = Results([one for path in RECORDS for one in read(path)])
    assert len(results.seeds) >= 5 and set(ORDER) <= set(results.arms)
    page = PAGE.read_text()
    assert fill(page, results) == page
