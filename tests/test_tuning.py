"""Launch choices: the table, the default, and that nothing is timed unless it is asked for."""

import json
from types import SimpleNamespace

import pytest
import torch

from hydra_kernels.backends import tuning
from tests.numerics import device_of

DEVICE = device_of("triton")
DEFAULT, WIDE, BROKEN = {"BLOCK": 64}, {"BLOCK": 128}, {"BLOCK": 4096}
CANDIDATES = (DEFAULT, BROKEN, WIDE)
ON_GPU = SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def hopper(monkeypatch, tmp_path):
    """A GPU of architecture 90 as far as the table can see, and a table of the test's own."""
    monkeypatch.setattr(tuning, "_arch", lambda device: "90")
    monkeypatch.setattr(tuning, "_TABLE", tmp_path / "table.json")
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("HYDRA_AUTOTUNE", raising=False)
    monkeypatch.delenv("HYDRA_TUNING_FILE", raising=False)
    (tmp_path / "table.json").write_text("[]")
    forget()
    yield
    forget()


def forget():
    tuning._rows.cache_clear()
    tuning._lookup.cache_clear()


def row(config=WIDE, kernel="toy", arch="90", **when):
    return {"kernel": kernel, "arch": arch, "when": when, "config": config}


def choose(launch=None, **sizes):
    return tuning.choose("toy", ON_GPU, sizes or {"M": 100}, CANDIDATES, launch)


def timed(monkeypatch, ms):
    """Replaces the clock: milliseconds by block, an exception where there are none."""
    ran = []

    def launch(config):
        ran.append(config["BLOCK"])
        if config["BLOCK"] not in ms:
            raise RuntimeError("out of resource: shared memory")
        return ms[config["BLOCK"]]

    monkeypatch.setattr(tuning, "_cuda_ms", lambda call: call())
    return launch, ran


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], DEFAULT),
        ([row()], WIDE),
        ([row(arch="80")], DEFAULT),
        ([row(kernel="other")], DEFAULT),
        ([row(M=[1, 99])], DEFAULT),
        ([row(M=[1, 100])], WIDE),
        ([row(M=[100, 100], config=BROKEN), row()], BROKEN),  # the first that fits
    ],
)
def test_the_table(rows, expected):
    tuning._TABLE.write_text(json.dumps(rows))
    assert choose() == expected


def test_other_devices_take_the_default():
    tuning._TABLE.write_text(json.dumps([row()]))
    assert tuning.choose("toy", torch.zeros(1), {"M": 100}, CANDIDATES) == DEFAULT


def test_nothing_is_timed_unless_asked(monkeypatch):
    launch, ran = timed(monkeypatch, {64: 2.0, 128: 1.0})
    assert choose(launch) == DEFAULT and ran == []
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    assert choose(launch) == WIDE and ran == [64, 4096, 128]
    assert choose(launch, M=128) == WIDE  # the same power of two
    assert len(ran) == 3
    assert choose(launch, M=129) == WIDE and len(ran) == 6


def test_yes_and_no_are_tuned_apart(monkeypatch, tmp_path):
    ms = {64: 2.0, 128: 1.0}
    launch, _ = timed(monkeypatch, ms)
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    monkeypatch.setenv("HYDRA_TUNING_FILE", str(tmp_path / "mine.json"))
    assert choose(launch, reference=0) == WIDE
    ms.update({64: 0.5})
    assert choose(launch, reference=1) == DEFAULT and choose(launch, reference=0) == WIDE
    found = tuning.read(tmp_path / "mine.json")
    assert found == [row(WIDE, reference=[0, 0]), row(DEFAULT, reference=[1, 1])]


def test_one_candidate_needs_no_clock(monkeypatch):
    launch, ran = timed(monkeypatch, {64: 2.0})
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    assert tuning.choose("toy", ON_GPU, {"M": 100}, (DEFAULT,), launch) == DEFAULT and ran == []


def test_a_users_file_is_read_before_the_packages_table(monkeypatch, tmp_path):
    tuning._TABLE.write_text(json.dumps([row(BROKEN)]))
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([row(WIDE, M=[1, 100])]))
    assert choose() == BROKEN
    monkeypatch.setenv("HYDRA_TUNING_FILE", str(file))
    assert choose() == WIDE and choose(M=101) == BROKEN


def test_nothing_is_timed_under_capture(monkeypatch):
    launch, ran = timed(monkeypatch, {64: 2.0, 128: 1.0})
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(launch) == DEFAULT and ran == []


def test_no_candidate_that_runs_is_an_error(monkeypatch):
    launch, _ = timed(monkeypatch, {})
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    with pytest.raises(RuntimeError, match="toy: no candidate runs: .*shared memory"):
        choose(launch)


def test_what_is_found_is_kept_and_read_again(monkeypatch, tmp_path):
    launch, ran = timed(monkeypatch, {64: 2.0, 128: 1.0})
    file = tmp_path / "mine.json"
    monkeypatch.setenv("HYDRA_TUNING_FILE", str(file))
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    choose(launch)
    assert tuning.read(file) == [row(M=[65, 128])]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "table.json"]
    monkeypatch.setattr(tuning, "_found", {})
    choose(launch)
    assert len(tuning.read(file)) == 1  # replaced, not repeated
    # A later process, which does not tune.
    monkeypatch.delenv("HYDRA_AUTOTUNE")
    monkeypatch.setattr(tuning, "_found", {})
    forget()
    assert choose(launch, M=65) == WIDE and choose(launch, M=129) == DEFAULT
    assert len(ran) == 6


@pytest.mark.parametrize("text", ['{"toy": 1}', '[{"kernel": "toy"}]', "[3]"])
def test_a_malformed_table_is_named(text):
    tuning._TABLE.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json: not a row of kernel, arch"):
        choose()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", r"table\.json: not JSON: "),
        (json.dumps([row(N=[1, 9])]), "toy: a tuning row asks for N, the kernel has M"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(text, said):
    tuning._TABLE.write_text(text)
    with pytest.raises(ValueError, match=said):
        choose()


def test_the_packages_table_is_well_formed():
    shipped = tuning.read(tuning.Path(tuning.__file__).with_suffix(".json"))
    for found in shipped:
        assert found["arch"].isdigit() and all(isinstance(n, int) for n in found["config"].values())
        assert all(low <= high for low, high in found["when"].values())


def test_every_choice_gives_the_same_answer(monkeypatch):
    """3000 tokens: several blocks of each size, and a tail."""
    pytest.importorskip("triton", reason="needs Triton, which exists for Linux on x86-64")
    from hydra_kernels import ppo_loss
    from hydra_kernels.backends.triton import ppo_loss as kernel

    device = DEVICE
    names = ("logprobs", "values", "old_logprobs", "old_values", "advantages", "returns")
    inputs = {name: torch.randn(3, 1000, device=device) for name in names}
    inputs["mask"] = torch.rand(3, 1000, device=device) < 0.7
    expected = ppo_loss(**inputs, backend="reference")
    for config in kernel.CONFIGS:
        monkeypatch.setattr(kernel, "CONFIGS", (config,))
        torch.testing.assert_close(ppo_loss(**inputs, backend="triton"), expected)


@pytest.mark.parametrize("reference", [False, True])
def test_every_choice_of_linear_logprob_gives_the_same_answer(monkeypatch, reference):
    """700 columns of 96: several blocks of each size, a tail of both, and two chunks backward."""
    pytest.importorskip("triton", reason="needs Triton, which exists for Linux on x86-64")
    from hydra_kernels import linear_logprob
    from hydra_kernels.backends.triton import linear_logprob as kernel

    device = DEVICE
    hidden, ref = (torch.randn(70, 96, device=device).half() for _ in range(2))
    weight = torch.randn(700, 96, device=device).half() / 10
    targets = torch.randint(700, (70,), device=device)
    hidden.requires_grad_()
    monkeypatch.setenv("HYDRA_LOGPROB_BUDGET_MB", str(kernel.CHUNK_UNIT * 70 * 2 / 2**20))

    def results(backend: str) -> tuple[torch.Tensor, ...]:
        out = linear_logprob(
            hidden, weight, targets, ref_hidden=ref if reference else None, backend=backend
        )
        parts = [out.logprobs, out.entropy] + ([out.kl] if reference else [])
        (gradient,) = torch.autograd.grad(sum(p.sum() for p in parts), hidden)
        return (*(p.detach() for p in parts), gradient)

    chosen: list[str] = []
    turns: list[int] = []

    def choose(name, tensor, sizes, candidates, launch):
        assert "M" not in sizes  # a row's result does not depend on the batch it sits in
        assert all(kernel.CHUNK_UNIT % c["BLOCK_V"] == 0 for c in candidates)
        chosen.append(name)
        return candidates[min(turns[-1], len(candidates) - 1)]

    monkeypatch.setattr(kernel.tuning, "choose", choose)
    expected = results("reference")
    for turn in range(len(kernel._fwd_candidates(2, reference, False, 9, True))):
        turns.append(turn)
        # the reference rounds its logits to half precision
        torch.testing.assert_close(results("triton"), expected, rtol=5e-3, atol=2e-2)
    assert {name.removeprefix("linear_logprob_") for name in chosen} == {
        "fwd",
        "dlogits",
        "dhidden",
    }
