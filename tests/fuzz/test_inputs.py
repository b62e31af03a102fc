"""A few of the inputs of ``make fuzz``, and that a reader which fails is found."""

import pytest

from tests.fuzz import inputs


def test_readers_answer_any_file():
    counts = inputs.fuzz(400, number=1)
    assert all(counts.values()) and sum(counts.values()) >= 300


@pytest.mark.parametrize("fault", ["traceback", "writes", "hangs"])
def test_a_bad_reader_is_found(fault, monkeypatch):
    def data(self, file):
        if fault == "traceback":
            raise KeyError("prompt")
        if fault == "writes":
            (self.outside / "new").touch()
        while fault == "hangs":
            pass

    monkeypatch.setattr(inputs.Targets, "data", data)
    monkeypatch.setattr(inputs, "LIMIT", 0.05)
    with pytest.raises((KeyError, AssertionError)):
        inputs.fuzz(5, number=1)


@pytest.mark.parametrize(
    "content", [b'"\\U10010000": 1', b"seed: 2001-13-40", b"seed: " + b"9" * 5000]
)
def test_settings_that_yaml_itself_cannot_build(content, tmp_path):
    """Found by fuzzing: PyYAML raises a bare ValueError."""
    inputs.Targets(tmp_path).config(("c.yaml", content))
