"""Names of models: what is wrong with one is told at once and in one line."""

import socket

import pytest
from huggingface_hub import constants

from hydra_rlhf import hub
from hydra_rlhf.errors import UserError


@pytest.fixture
def no_network(monkeypatch):
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    hub._reaches_hub.cache_clear()
    yield asked
    hub._reaches_hub.cache_clear()


def test_a_folder_is_not_looked_for_anywhere_else(tmp_path, no_network):
    assert hub.missing(tmp_path) is None
    assert no_network == []


@pytest.mark.parametrize("name", ["./runs/sft", "/runs/sft", "a/b/c", "runs/", "~/sft"])
def test_a_path_is_not_asked_for_on_the_hub(name, no_network, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert hub.missing(name) == "there is no such folder"
    assert no_network == []


def test_a_file_is_not_a_model(tmp_path, no_network):
    (tmp_path / "model.gguf").touch()
    assert hub.missing(tmp_path / "model.gguf") == "it is a file, not a folder"


@pytest.mark.parametrize("name", ["gpt2", "owner/model", "runs/stf"])
def test_without_a_network_a_name_is_refused_at_once(name, no_network):
    with pytest.raises(UserError) as error, hub.loading("a tokenizer", name):
        pytest.fail("asked for")
    assert str(error.value) == (
        f"cannot load a tokenizer from {name}: there is no such folder, and the Hub cannot be "
        "reached from here"
    )
    assert hub.missing(name) and len(no_network) == 1, "asked once"
    assert constants.HF_HUB_OFFLINE, "and nobody asks after it"


def test_without_a_network_the_cache_serves(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file: str(tmp_path) if name == "owner/cached" else None,
    )
    assert hub.missing("owner/cached") is None
    assert hub.missing("owner/other") is not None


def test_behind_a_proxy_the_hub_is_asked(no_network, monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.missing("owner/model") is None
    assert no_network == []


def test_errors_of_loading_are_one_line(tmp_path):
    with pytest.raises(UserError, match=f"^cannot load a head from {tmp_path}: first$"):
        with hub.loading("a head", tmp_path, KeyError):
            raise OSError("first\nsecond")
    with pytest.raises(ZeroDivisionError), hub.loading("a head", tmp_path):
        raise ZeroDivisionError
