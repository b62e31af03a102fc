"""Launch choices: the table, the default, and that nothing is timed unless it is asked for."""

import contextlib
import importlib
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


OUTPUT = torch.linspace(-3.0, 3.0, 64)


def timed(monkeypatch, ms, spoil=None):
    """Replaces the clock: milliseconds by block, an exception where there are none; ``spoil`` does
    to the output of the wide block what a wrong kernel would. Lists the blocks that were timed."""
    ran = []
    out = torch.zeros_like(OUTPUT)
    launched = []

    def launch(config):
        launched.append(config["BLOCK"])
        if config["BLOCK"] not in ms:
            raise RuntimeError("out of resource: shared memory")
        if config["BLOCK"] == 128 and spoil is not None:
            spoil(out)
        else:
            out.copy_(OUTPUT)
        return out

    def clock(call):
        call()
        ran.append(launched[-1])
        return ms[launched[-1]]

    monkeypatch.setattr(tuning, "_cuda_ms", clock)
    monkeypatch.setattr(tuning, "_synchronize", lambda: None)
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
    assert choose(launch) == WIDE and ran == [64, 128]
    assert choose(launch, M=128) == WIDE  # the same power of two
    assert len(ran) == 2
    assert choose(launch, M=129) == WIDE and len(ran) == 4


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


def test_without_the_default_no_candidate_can_be_checked(monkeypatch, tmp_path):
    launch, ran = timed(monkeypatch, {128: 1.0})
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    monkeypatch.setenv("HYDRA_TUNING_FILE", str(tmp_path / "mine.json"))
    said = r"toy: the default .*64.* does not run, .*shared memory"
    with pytest.raises(RuntimeError, match=said):
        choose(launch)
    assert ran == [] and not (tmp_path / "mine.json").exists()


def nothing(out):
    """A kernel that writes nothing: what was there before must not be taken for its output."""


WRONG = {
    "one element": (
        lambda out: out.copy_(OUTPUT)[7].add_(1e-2),
        "in 1 of 64: off by up to 1.00e-02",
    ),
    "not finite": (lambda out: out.copy_(OUTPUT)[7].fill_(torch.inf), "in 1 of 64: not finite"),
    "a tail": (lambda out: out[:60].copy_(OUTPUT[:60]), "in 4 of 64: not finite"),
    "nothing": (nothing, "in 64 of 64: not finite"),
    "a constant": (lambda out: out.zero_(), "in 64 of 64: off by up to 3.00e+00"),
}


@pytest.mark.parametrize("spoil, said", WRONG.values(), ids=WRONG)
def test_a_candidate_that_is_fast_and_wrong_is_never_kept(
    monkeypatch, tmp_path, caplog, spoil, said
):
    launch, ran = timed(monkeypatch, {64: 2.0, 128: 1.0}, spoil)
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    monkeypatch.setenv("HYDRA_TUNING_FILE", str(tmp_path / "mine.json"))
    assert choose(launch) == DEFAULT and ran == [64]
    assert tuning.read(tmp_path / "mine.json") == [row(DEFAULT, M=[65, 128])]
    left_out = [r.message for r in caplog.records if "left out" in r.message]
    assert left_out[0].endswith("{'BLOCK': 4096}: does not run: out of resource: shared memory")
    assert "{'BLOCK': 128}: output 0 differs" in left_out[1] and said in left_out[1]


def test_rounding_is_no_difference(monkeypatch):
    """Of float32 sums in another order, and of one more rounding to half precision."""
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    launch, _ = timed(monkeypatch, {64: 2.0, 128: 1.0}, lambda out: out.copy_(OUTPUT * (1 + 1e-5)))
    assert choose(launch) == WIDE
    for dtype in (torch.float16, torch.bfloat16):
        exact = torch.randn(1000).to(dtype)
        rounded = (exact.float() * (1 + torch.finfo(dtype).eps / 2)).to(dtype)
        assert not exact.equal(rounded)
        assert tuning._differs([rounded], [exact]) == ""
        assert "off by" in tuning._differs([exact * 1.1], [exact])


def test_room_that_the_kernel_leaves_alone_is_not_compared_and_not_changed():
    """As the columns of a chunk past the vocabulary, or zeros that were there before."""
    out = torch.zeros(8)

    def launch(config):
        out[: 6 if config["BLOCK"] == 64 else 8] = 1.0  # the wide one writes more than it has to
        return out, None

    clock = {64: 2.0, 128: 1.0}
    ran = []

    def launch_named(config):
        ran.append(config["BLOCK"])
        return launch(config)

    def time_ms(call):
        call()
        return clock[ran[-1]]

    assert tuning.fastest("toy", (DEFAULT, WIDE), launch_named, time_ms) == WIDE
    assert out.tolist() == [1.0] * 6 + [0.0] * 2


def test_a_candidate_that_loses_the_device_ends_the_tuning(monkeypatch, tmp_path):
    """After it nothing that is measured means anything."""
    launch, _ = timed(monkeypatch, {64: 2.0, 128: 1.0})

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "_synchronize", lost)
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")
    monkeypatch.setenv("HYDRA_TUNING_FILE", str(tmp_path / "mine.json"))
    with pytest.raises(RuntimeError, match="toy: the candidate .*4096.* lost the device"):
        choose(launch)
    assert not (tmp_path / "mine.json").exists()


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
    assert len(ran) == 4


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
    for turn in range(len(kernel._fwd_candidates(2, reference, False, 9, True, False))):
        turns.append(turn)
        # the reference rounds its logits to half precision
        torch.testing.assert_close(results("triton"), expected, rtol=5e-3, atol=2e-2)
    assert {name.removeprefix("linear_logprob_") for name in chosen} == {
        "fwd",
        "dlogits",
        "dhidden",
    }


def tuned(monkeypatch, module, wrong=()):
    """Makes each choice of ``module`` by tuning, on whatever device, the last candidates being the
    faster ones; those of the kernels named in ``wrong`` are off in one element. Collects
    what was chosen, as the number of a candidate."""
    chosen: dict[str, tuple[int, int]] = {}

    def choose(name, tensor, sizes, candidates, launch):
        candidates = list(candidates)[:2]
        turns = iter(range(len(candidates), 0, -1))

        def spoilt(config):
            outputs = launch(config)
            if name in wrong and config != candidates[0]:
                flat = tuning._tensors(outputs)[0].view(-1)
                flat[flat.nan_to_num().abs().argmax()] += 1.0
            return outputs

        def time_ms(call):
            call()
            return next(turns)

        config = tuning.fastest(name, candidates, spoilt, time_ms)
        chosen[name] = (candidates.index(config), len(candidates))
        return config

    monkeypatch.setattr(module.tuning, "choose", choose)
    return chosen


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("op", ["ppo_loss", "linear_logprob", "lora_linear"])
def test_the_tuner_checks_what_the_kernels_write(monkeypatch, op, wrong):
    """Right candidates of every tuned kernel pass, a wrong one of any does not, and either way the
    call that tunes gives the right answer."""
    pytest.importorskip("triton", reason="needs Triton, which exists for Linux on x86-64")
    import hydra_kernels
    from hydra_kernels.backends import triton

    module = importlib.import_module(f"{triton.__name__}.{op}")
    kernels = {
        "ppo_loss": ["ppo_loss_fwd"],
        "linear_logprob": [f"linear_logprob_{k}" for k in ("fwd", "dlogits", "dhidden")],
        "lora_linear": [f"lora_linear_{k}" for k in ("shrink", "fwd", "contract", "bwd")],
    }[op]

    def half(*size):
        return torch.randn(size, device=DEVICE).half() / size[-1] ** 0.5

    mask = torch.rand(3, 1000, device=DEVICE) < 0.7
    tokens = [torch.randn(3, 1000, device=DEVICE) for _ in range(6)]
    x, weight, a, b = (half(*size) for size in [(70, 96), (304, 96), (8, 96), (304, 8)])
    targets = torch.randint(304, (70,), device=DEVICE).masked_fill_(
        torch.arange(70, device=DEVICE) % 9 == 0, -100
    )
    ids = torch.arange(70, device=DEVICE) % 3 - 1

    def run(backend):
        if op == "ppo_loss":
            names = ("old_logprobs", "old_values", "advantages", "returns")
            leaves = [t.detach().clone().requires_grad_() for t in tokens[:2]]
            given = dict(zip(names, tokens[2:], strict=True))
            out = hydra_kernels.ppo_loss(*leaves, **given, mask=mask, backend=backend)
            return (*out, *torch.autograd.grad(out.loss, leaves))
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
        if op == "linear_logprob":
            out = hydra_kernels.linear_logprob(leaves[0], weight, targets, backend=backend)
            total = out.logprobs.sum() + out.entropy.sum()
            return out.logprobs, out.entropy, *torch.autograd.grad(total, leaves[:1])
        lora_a, lora_b = [[t, t.flip(0)] for t in leaves[1:]]
        y = hydra_kernels.lora_linear(
            leaves[0], weight, lora_a, lora_b, [2.0, 0.5], adapter_ids=ids, backend=backend
        )
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    expected = run("reference")
    chosen = tuned(monkeypatch, module, kernels if wrong else ())
    actual = run("triton")
    assert {name: number for name, (number, _) in chosen.items()} == {
        name: 0 if wrong else of - 1 for name, (_, of) in chosen.items()
    }
    assert sorted(chosen) == sorted(kernels)
    assert all(of > 1 for _, of in chosen.values())
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=2e-2)


def test_what_a_candidate_tunes_in_turn_is_compiled_with_it(monkeypatch):
    """The inner choices of all outer candidates in one go, and none of them made by what is not
    launched."""
    launch, ran = timed(monkeypatch, {64: 2.0, 128: 1.0})
    listed = []

    def compile_launches(launches):
        for each in launches:
            before = len(listed)
            with contextlib.suppress(RuntimeError):
                each()
            listed[before:] = [tuple(listed[before:])]

    monkeypatch.setattr(tuning, "compile_launches", compile_launches)
    monkeypatch.setenv("HYDRA_AUTOTUNE", "1")

    def inner(config):
        if tuning._listing.on:
            listed.append(config["BLOCK"])
        return launch(config)

    def outer(config):
        assert choose(inner, M=7) == (DEFAULT if tuning._listing.on else WIDE)
        return launch(config)

    assert tuning.choose("outer", ON_GPU, {"M": 100}, (DEFAULT, WIDE), outer) == WIDE
    assert listed[:2] == [(4096, 128), (4096, 128)] and not tuning._listing.on
    assert ran == [64, 128, 64, 128]  # the inner ones once, when they are first launched
