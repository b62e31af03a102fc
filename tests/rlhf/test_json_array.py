"""An array read in pieces is what ``json`` makes of it whole, wherever the pieces end."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_rlhf.data import json_array
from hydra_rlhf.errors import UserError

PATH = Path("a.json")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def read(content, chunk=3):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "CHUNK", chunk)
        return list(json_array.elements(io.BytesIO(content), PATH))


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(VALUES, max_size=4), chunk=st.integers(1, 40), wide=st.booleans())
def test_any_array_in_any_pieces(rows, chunk, wide):
    text = json.dumps(rows, indent=2 if wide else None, ensure_ascii=chunk % 2 == 0)
    assert read(text.encode(errors="surrogatepass"), chunk) == rows


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_pieces_that_end_in_a_character_a_number_or_an_escape(chunk):
    content = b'\xef\xbb\xbf [12, 3.5e2,"\xc3\xa9\xe2\x82\xac", "\\u00e9\\\\", -0, true ] \n'
    assert read(content, chunk) == [12, 350.0, "é€", "é\\", 0, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2", "line 1: not JSON: Expecting ',' at column 6"),
        (b'[{"a": 1},\n {"a" 1}]', "line 2: not JSON: Expecting ':' delimiter at column 7"),
        (b"[1,\n2\n3]", "line 3: not JSON: Expecting ',' at column 1"),
        (b"[1, ]", "line 1: not JSON: Expecting value at column 5"),
        (b"[1]\n\n []", "line 3: not JSON: Extra data at column 2"),
        (b'["a\nb"]', "line 1: not JSON: Invalid control character at column 4"),
        (b'[1, "open]', "line 1: not JSON: Unterminated string starting at column 5"),
        (b"[" + b"9" * 5000 + b"]", "line 1: not JSON: .*digits.* at column 2"),
        (b"[" * 100_000, "line 1: not JSON: .*recursion depth.* at column 2"),
        (b'["a", "\xe9"]', "a.json: not JSON: not UTF-8: byte 0xe9, number 8 of the file"),
        (b'["a", "\xc3', "a.json: not JSON: not UTF-8: byte 0xc3, number 8 of the file"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[10:40],
)
@pytest.mark.parametrize("chunk", [1, 4, 1 << 16])
def test_faults_are_placed_whatever_the_pieces(content, message, chunk):
    if len(content) > 1000 and chunk < 100:
        chunk = 1000  # of a byte they would take a minute
    with pytest.raises(UserError, match=message):
        read(content, chunk)


def test_what_is_before_a_fault_comes_first():
    found = json_array.elements(io.BytesIO(b'[{"a": 1}, {"b": 2}, oops]'), PATH)
    assert [next(found), next(found)] == [{"a": 1}, {"b": 2}]
    with pytest.raises(UserError, match="Expecting value at column 22"):
        next(found)


def test_a_mistake_early_in_a_large_file_is_told_without_reading_it_all():
    rest = b", 1" * 500_000
    file = io.BytesIO(b'[{"a" "b"}' + rest)
    with pytest.raises(UserError, match="column 7"):
        next(json_array.elements(file, PATH))
    assert file.tell() <= 2 * json_array.CHUNK


def test_one_element_larger_than_a_piece_is_read_in_few_reads():
    reads = []

    class Counting(io.BytesIO):
        def read(self, count=-1):
            reads.append(count)
            return super().read(count)

    text = "x" * (50 * json_array.CHUNK)
    assert list(json_array.elements(Counting(json.dumps([text]).encode()), PATH)) == [text]
    assert len(reads) < 12
