"""Reading rows: every file type, every way in which one can be broken, in constant memory."""

import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_rlhf.data import Preference, iter_preferences, load_preferences, load_prompts, load_sft
from hydra_rlhf.data.check import check, render
from hydra_rlhf.errors import UserError

datasets = pytest.importorskip("datasets", reason="reads hub data sets: needs datasets installed")

ROWS = [{"prompt": f"Sky {i}?", "chosen": f" Blué, {i}\n!", "rejected": " No"} for i in range(3)]
PAIRS = [Preference(**row) for row in ROWS]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = b"prompt,chosen,rejected\n" + b"".join(
    f'"{r["prompt"]}","{r["chosen"]}","{r["rejected"]}"\n'.encode() for r in ROWS
)
FILES = {
    "a.jsonl": JSONL,
    "upper.JSONL": JSONL,
    "bom.jsonl": b"\xef\xbb\xbf" + JSONL,
    "crlf.jsonl": JSONL.replace(b"\n", b"\r\n"),
    "blank lines.jsonl": JSONL.replace(b"\n", b"\n\n \n"),
    "no last newline.jsonl": JSONL.rstrip(b"\n"),
    "a.ndjson": JSONL,
    "a.jsonl.gz": gzip.compress(JSONL),
    "lines.json": JSONL,
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "bom array.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode(),
    "a.csv": CSV,
    "bom.csv": b"\xef\xbb\xbf" + CSV,
    "crlf.csv": CSV.replace(b'"\n', b'"\r\n').replace(b"rejected\n", b"rejected\r\n"),
    "a.csv.gz": gzip.compress(CSV),
    "a.tsv": CSV.replace(b'","', b'"\t"').replace(b"prompt,chosen,", b"prompt\tchosen\t"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_type(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert load_preferences(tmp_path / name) == PAIRS
    assert list(iter_preferences(str(tmp_path / name))) == PAIRS


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load_preferences(tmp_path / "a.parquet") == PAIRS
    # Nested columns too: messages and margins.
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    row = {"prompt": None, "messages": [user, answer]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b.parquet")
    report = check(tmp_path / "b.parquet", format="messages")
    assert report.usable and report.examples == {"demonstrations": 1}


def test_folders(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(JSONL)
    assert load_preferences(tmp_path / "files") == PAIRS
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    assert load_preferences(tmp_path / "one") == PAIRS
    datasets.DatasetDict({"train": one, "eval": one.select([1])}).save_to_disk(tmp_path / "two")
    assert load_preferences(tmp_path / "two") == PAIRS
    assert load_preferences(tmp_path / "two", split="eval") == PAIRS[1:2]
    with pytest.raises(UserError, match="no split 'test'; it has train, eval"):
        load_preferences(tmp_path / "two", split="test")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: cannot be loaded: "):
        load_preferences(tmp_path / "none")


def test_a_hub_set(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_preferences("someone/pairs") == PAIRS
    assert list(iter_preferences("someone/pairs:v2", split="test[:3]")) == PAIRS
    assert calls == [
        (("someone/pairs", None), {"split": "train", "streaming": False}),
        (("someone/pairs", "v2"), {"split": "test[:3]", "streaming": True}),
    ]

    def missing(*args, **kwargs):
        raise FileNotFoundError("Couldn't reach\n'someone/pairs' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError) as error:
        load_preferences("someone/pairs")
    assert str(error.value) == (
        "someone/pairs (no such file; read from the Hub): cannot be loaded: "
        "Couldn't reach 'someone/pairs' on the Hub"
    )


GOOD_LINE = b'{"prompt": "a"}\n'
BROKEN = {
    "cut.jsonl": (GOOD_LINE + b'{"prompt": "b\n', "line 2: not JSON: .* at column 12"),
    "after blanks.jsonl": (b"\n\n" + GOOD_LINE + b"\n{\n", "line 5: not JSON"),
    "text.jsonl": (GOOD_LINE + b'"b"\n', "line 2: expected an object.*found text"),
    "null.jsonl": (b"null\n", "line 1: .*found null"),
    "latin.jsonl": (GOOD_LINE + b'{"prompt": "\xe9"}\n', "line 2: not UTF-8: byte 0xe9 at col.*13"),
    "wide.jsonl": (JSONL.decode().encode("utf-16"), "UTF-16; save it as UTF-8"),
    "digits.jsonl": (b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: "),
    "deep.jsonl": (b"[" * 100_000, "line 1: "),
    "empty.jsonl": (b"", "no prompts in it"),
    "blank.jsonl": (b"\n \r\n", "no prompts in it"),
    "empty.json": (b"", "no prompts in it"),
    "empty array.json": (b"[]", "no prompts in it"),
    "cut.json": (b'[{"prompt": "a"},\n{"prompt"', "line 2: not JSON: .* column 10"),
    "numbers.json": (b"[1, 2]", "row 1: expected an object.*a number"),
    "latin.json": (b'[{"prompt": "\xe9"}]', "not JSON: not UTF-8: byte 0xe9"),
    "empty.csv": (b"", "no prompts in it"),
    "header.csv": (b"prompt\n", "no prompts in it"),
    "short.csv": (b"prompt,id\na,1\n\nb\n", "line 4: expected 2 columns.*found 1"),
    "after newlines.csv": (b'prompt,id\n"a\n\n",1\nb,1,2\n', "line 5: .*found 3"),
    "quote.csv": (b'prompt\n"a"b\n', "line 2: not CSV"),
    "open quote.csv": (b'prompt\n"a\n', "not CSV: unexpected end"),
    "latin.csv": (b"prompt\na\n\xe9\n", "line 3: not UTF-8"),
    "null.csv": (b"prompt,id\n,1\n", "line 2: column 'prompt' is null"),
    "twice.csv": (b"prompt,prompt\na,b\n", "occurs twice"),
    "a.parquet": (b"PAR1 no more", "not a readable Parquet file"),
    "named wrongly.jsonl": (b"PAR1....PAR1", "is a Parquet file; name it .parquet"),
    "a.jsonl.gz": (b"no gzip", "cannot be read"),
    "cut.jsonl.gz": (gzip.compress(JSONL * 99)[:-20], "cannot be read"),
    "a.txt": (b"a", r"unknown file type '.txt'; known are .jsonl, .json"),
    "a.parquet.gz": (b"", "unknown file type"),
    "a": (b"a", "unknown file type ''"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_prompts(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="a.jsonl: no such file"):
        load_prompts(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="data/a.csv.gz: no such file"):  # not a set on the Hub
        load_prompts("data/a.csv.gz")
    with pytest.raises(UserError, match="is no file name"):
        load_prompts("a" * 5000)
    with pytest.raises(UserError, match="no file name|no such file"):
        load_prompts("a\0b")
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    with pytest.raises(UserError, match="one file has no splits, so no split 'test'"):
        load_prompts(tmp_path / "a.jsonl", split="test")


def test_the_rows_before_a_bad_one_come_first(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL + b"{\n")
    rows = iter_preferences(tmp_path / "a.jsonl")
    assert [next(rows) for _ in PAIRS] == PAIRS
    with pytest.raises(UserError, match="line 4: not JSON"):
        next(rows)


def test_wrong_arguments_are_refused_before_the_first_row(tmp_path):
    for options in ({"format": "x"}, {"overlong": "x"}, {"split": "x"}):
        (tmp_path / "a.jsonl").write_bytes(JSONL)
        with pytest.raises(UserError):
            iter_preferences(tmp_path / "a.jsonl", **options)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_streaming_takes_constant_memory(tmp_path, suffix):
    path, rows, text = tmp_path / f"big{suffix}", 6_000, "x" * 500
    if suffix == ".parquet":
        table = pyarrow.table({key: [text] * rows for key in ("prompt", "chosen", "rejected")})
        pyarrow.parquet.write_table(table, path, row_group_size=1000, use_dictionary=False)
    elif suffix == ".json":
        path.write_text(json.dumps([dict.fromkeys(ROWS[0], text)] * rows))
    else:
        line = json.dumps(dict.fromkeys(ROWS[0], text)) if suffix == ".jsonl" else f"{text}," * 2
        head = "" if suffix == ".jsonl" else "prompt,chosen,rejected\n"
        tail = "" if suffix == ".jsonl" else text
        path.write_text(head + f"{line}{tail}\n" * rows)
    next(iter_preferences(path))  # what is imported on the way does not count
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_preferences(path)) == rows  # 9 MB of text
        assert tracemalloc.get_traced_memory()[1] < 1.5e6
    finally:
        tracemalloc.stop()


# ---- whatever the bytes, a UserError is the only exception


COLUMNS = st.sampled_from(
    "prompt chosen rejected completion messages text role content margin question response_j "
    "response_k info summaries choice post user_input responses_and_scores response score replies "
    "rank instruction input output message_tree_id message_id parent_id".split()
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(COLUMNS, inner, max_size=4),
    max_leaves=12,
)
TREE = {"role": st.just("prompter"), "text": JSON}
ROW = st.one_of(
    *(
        st.fixed_dictionaries(dict.fromkeys(columns.split(), JSON), optional={"margin": JSON})
        for columns in (
            "prompt",
            "prompt chosen rejected",
            "chosen rejected",
            "prompt completion",
            "messages",
            "text",
            "question response_j response_k",
            "info summaries choice",
            "user_input responses_and_scores",
            "instruction input output",
            "message_tree_id message_id parent_id role text",
        )
    ),
    st.fixed_dictionaries({"prompt": st.fixed_dictionaries({**TREE, "replies": JSON})}),
    JSON,
)
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def try_all(path):
    for load in (load_preferences, load_sft, load_prompts):
        try:
            assert load(path)
        except UserError as error:
            assert str(error) and "\n" not in str(error)
    try:
        assert render(check(path))
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@FUZZ
@given(content=st.binary(max_size=200), name=st.sampled_from([*FILES, "a.parquet"]))
def test_arbitrary_bytes(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    try_all(tmp_path / name)


@FUZZ
@given(rows=st.lists(ROW, min_size=1, max_size=3))
def test_arbitrary_json(tmp_path, rows):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try_all(tmp_path / "a.jsonl")


@FUZZ
@given(data=st.data(), name=st.sampled_from(["a.jsonl", "a.csv", "array.json", "a.jsonl.gz"]))
def test_damaged_files(tmp_path, data, name):
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try_all(tmp_path / name)
