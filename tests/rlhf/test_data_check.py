"""``hydra-rlhf data check``: what it counts, what it lists, and its exit code."""

import json

import pytest

from hydra_rlhf.cli import main
from hydra_rlhf.data.bundled import build_tokenizer
from hydra_rlhf.data.check import MAX_BAD_ROWS, check, render

ROW = {"prompt": "abcd", "chosen": " xy", "rejected": " z"}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return str(path)

    return write


@pytest.fixture
def letters(tmp_path):
    """A folder with a tokenizer of a token a byte."""
    build_tokenizer(["~"], 259).save_pretrained(tmp_path / "letters")
    return str(tmp_path / "letters")


def test_counts(write):
    path = write(
        ROW,
        ROW,
        {**ROW, "chosen": " same", "rejected": " same"},
        {**ROW, "prompt": "abcdefgh", "rejected": ""},
        {**ROW, "prompt": "ab"},
    )
    report = check(path)
    assert (report.format, report.rows, report.examples) == ("preference", 5, {"preferences": 5})
    assert (report.repeated_examples, report.repeated_prompts) == (1, 2)
    assert (report.identical_pairs, report.empty_answers) == (1, 1)
    assert report.characters["prompt"] == [2, 4, 4, 4, 8, 8]
    assert report.characters["chosen"] == [3, 3, 3, 3, 5, 5]
    assert report.usable and not report.tokens and not report.has_transcripts


def test_tokens_and_truncation(write):
    path = write(ROW, {**ROW, "prompt": "é" * 4})
    report = check(path, tokenizer=build_tokenizer(["~"], 259), max_length=8)
    assert report.tokens["prompt"] == [4, 4, 4, 8, 8, 8]
    assert report.overlong == 1  # 8 + 3 + 1 tokens; 4 + 3 + 1 just fit
    assert report.usable
    with pytest.raises(ValueError, match="needs a tokenizer"):
        check(path, max_length=8)


def test_all_bad_rows_are_counted_and_the_first_are_listed(write):
    bad = ["{", json.dumps({**ROW, "chosen": 3}), json.dumps({"prompt": "a"})]
    report = check(write(ROW, *bad * 10, ROW))
    assert (report.rows, report.bad_rows, report.usable) == (32, 30, False)
    assert len(report.problems) == MAX_BAD_ROWS == 20
    assert [where for where, _ in report.problems] == [f"line {n}" for n in range(2, 22)]
    assert [why.split(":")[0] for _, why in report.problems[:3]] == [
        "not JSON",
        "column 'chosen'",
        "no column 'chosen' (found",
    ]
    shown = render(report)
    assert "line 4: no column 'chosen'" in shown and "... and 10 more" in shown
    assert shown.endswith("not usable: 30 of 32 rows are bad")


def test_the_format_is_told_from_the_first_row_that_has_one(write):
    report = check(write("{", {"a": 1}, ROW))
    assert (report.format, report.bad_rows) == ("preference", 2)
    assert "unknown columns: found 'a'; known formats: preference" in report.problems[1][1]


def test_a_long_problem_is_told_once(write):
    report = check(write({"a": 1}, {"a": 1}, {"b": 1}))
    (first, why), (second, same), (_, other) = report.problems
    assert (first, second, same) == ("line 1", "line 2", "as line 1")
    assert why.startswith("unknown columns: found 'a'; known formats: ")
    assert other.startswith("unknown columns: found 'b'; known formats: ")


def test_empty_prompts_are_counted(write):
    pairs = [{"chosen": "red", "rejected": "blue"}, {"chosen": "a b", "rejected": "a c"}]
    report = check(write(*pairs))
    assert report.usable and report.empty_prompts == 1
    assert "  1 examples have an empty prompt\n" in render(report)
    assert check(write({"text": "a"})).empty_prompts == 0  # demonstrations may have none


def test_conversations_without_a_template_are_measured_as_transcripts(write):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    path = write({"messages": [user, answer]})
    report = check(path)
    assert report.usable and report.has_transcripts
    assert report.characters == {
        "prompt": [len("\n\nHuman: a\n\nAssistant:")] * 6,
        "completion": [2] * 6,
    }
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert check(write({"conversations": turns})).has_transcripts
    tokenizer = build_tokenizer(["~"], 259)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert not check(path, tokenizer=tokenizer).has_transcripts


def test_command_on_a_good_file(write, letters, capsys):
    assert main(["data", "check", write(ROW), "--tokenizer", letters, "--max-length", "8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1:3] == ["  format     preference", "  rows       1: 1 preferences"]
    assert out[3].split() == ["characters", "min", "25%", "median", "75%", "95%", "max"]
    assert out[4].split() == ["prompt", *["4"] * 6]
    assert out[-1] == "usable"
    assert main(["data", "check", write(ROW), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == {"preferences": 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "it is empty"),
        (["{"], "1 of 1 rows are bad"),
        ([{"user_input": "a", "responses_and_scores": []}], "its rows hold no examples"),
    ],
)
def test_command_on_an_unusable_file(write, capsys, lines, message):
    path = write(*lines)
    assert main(["data", "check", path]) == 2
    captured = capsys.readouterr()
    assert captured.out.endswith(f"not usable: {message}\n")
    assert captured.err == f"hydra-rlhf: error: {path}: not usable: {message}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check", "missing.jsonl"], "missing.jsonl: no such file"),
        (["check"], "file"),
        (["look", "a.jsonl"], "action"),
        (["check", "a.jsonl", "b.jsonl"], "unexpected 'b.jsonl'"),
        (["check", "a.jsonl", "--max-length", "3"], "needs a tokenizer"),
        (["check", "a.jsonl", "--tokenizer", "/nowhere"], "cannot load a tokenizer from /nowhere"),
        (["check", "a.jsonl", "--format", "x"], "unknown data format 'x'"),
    ],
)
def test_command_refuses(capsys, argv, message):
    assert main(["data", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_value_that_a_config_file_has_wrong_is_told_with_the_file(tmp_path, capsys):
    """The file is read with what it may leave out: the first word, which is one of a few."""
    config = tmp_path / "check.yaml"
    config.write_text("max_length: many\n")
    assert main(["data", "check", "pairs.jsonl", "--config", str(config)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hydra-rlhf: error: {config}: argument --max-length: ")
