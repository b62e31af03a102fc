"""A decoding step that a GPU can capture, as far as a machine without one can tell.

On torch's meta device a step that looks at a value fails, and every tensor of another device is one
that a GPU would wait for. The graphs' bookkeeping runs on the CPU, with a step in place of each.
"""

import contextlib
import dataclasses
import operator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydra_kernels.nn import LMHead
from hydra_rlhf.decode_state import State, prefill_masks
from hydra_rlhf.engine import RolloutEngine, _is_captured
from hydra_rlhf.replayed import _side_stream
from hydra_rlhf.rollout import Sampling, generate, pad_left
from tests.rlhf.families import EOS, FAMILIES, PAD, make_model
from tests.rlhf.test_engine import GREEDY, PROMPTS

META = torch.device("meta")
EVERY_FILTER = Sampling(
    20, 0.7, (EOS, 13), PAD, top_k=5, top_p=0.9, min_p=0.05, min_response_length=3
)
PLAIN = EVERY_FILTER._replace(top_k=0, top_p=1.0, min_p=0.0)


class Refusing(TorchDispatchMode):
    """Fails at what a capture cannot do: values on the host, and numbers drawn by a generator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        elsewhere = [t for t in tensors if t.device != META]
        assert not elsewhere, f"{op} has a tensor on {elsewhere[0].device}"
        assert torch.Tag.nondeterministic_seeded not in op.tags, f"{op} draws from a generator"
        assert torch.Tag.dynamic_output_shape not in op.tags, f"{op} has a shape of its values"
        if op is torch.ops.aten.index_put_.default:
            # A number; of a CUDA tensor torch 2.11 makes a tensor on the host, and copies that.
            assert args[2].dim() > 0, f"{op} copies a number to the device"
        self.count += 1
        return out


def to_meta(engine: RolloutEngine) -> State:
    """The engine's model and state without values."""
    model, state = engine.model, engine._state
    assert state is not None
    model.to(META)
    model.__dict__["lm_head"] = LMHead.from_model(model.causal_lm)
    for name in (f.name for f in dataclasses.fields(state)):
        if isinstance(getattr(state, name), Tensor):
            setattr(state, name, getattr(state, name).to(META))
    cache = state.cache
    cache.pairs = [tuple(t.to(META) for t in pair) for pair in cache.pairs]
    cache.rows, cache.slot = cache.rows.to(META), cache.slot.to(META)
    engine._adapter = engine._adapter.to(META)
    return state


@pytest.fixture
def on_meta(monkeypatch):
    """torch.is_autocast_enabled knows no meta device."""
    known = torch.is_autocast_enabled

    def enabled(device: str = "cpu") -> bool:
        return device != "meta" and known(device)

    monkeypatch.setattr(torch, "is_autocast_enabled", enabled)


def prepared(family: str, sampling: Sampling, **options) -> RolloutEngine:
    model = make_model(family, ("joint",), trained=True, layers_to_transform=[1, 2])
    engine = RolloutEngine(model, replay=False)
    ids, mask = pad_left(PROMPTS[:3], PAD)
    engine.generate(ids, mask, sampling, values=True, keep_prefix=True)
    engine.graph = True  # so that the adapter's id is a tensor
    return engine


@pytest.mark.parametrize(
    ("family", "sampling"),
    [*((family, EVERY_FILTER) for family in FAMILIES), ("llama", PLAIN), ("llama", GREEDY)],
)
def test_a_step_never_asks_the_device(family, sampling, on_meta):
    engine = prepared(family, sampling)
    state = to_meta(engine)
    engine._entering.state = state
    with torch.no_grad(), engine.model.no_dropout(), engine._adapters(0), engine._entering:
        with Refusing() as refusing:
            engine._token(state, 16, sampling)
    assert refusing.count > 100


@pytest.mark.parametrize(
    "wrong", ["state.finished.any().item()", "torch.rand(1, device='meta')",
              "state.token + torch.tensor([1])", "state.finished.nonzero()",
              "operator.setitem(state.mask, (state.cache.rows, state.cache.slot), 0.0)"]
)  # fmt: skip
def test_the_test_above_can_fail(wrong, on_meta, monkeypatch):
    engine = prepared("llama", PLAIN)
    state = to_meta(engine)
    advance = engine._advance

    def asks(state):
        eval(wrong, {"state": state, "torch": torch, "operator": operator})
        advance(state)

    monkeypatch.setattr(engine, "_advance", asks)
    engine._entering.state = state
    with torch.no_grad(), engine.model.no_dropout(), engine._adapters(0):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Refusing():
            engine._token(state, 16, PLAIN)


class Graph:
    """In place of a CUDA graph: the step that it was captured from, with nothing else read."""

    captured = 0

    def __init__(self, engine, state, seen, sampling):
        Graph.captured += 1
        self.engine, self.state, self.seen, self.sampling = engine, state, seen, sampling

    def replay(self):
        assert self.engine._state is self.state, "a graph of freed buffers"
        self.engine._token(self.state, self.seen, self.sampling)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(RolloutEngine, "_capture", lambda *of: Graph(*of))
    monkeypatch.setattr(Graph, "captured", 0)


def test_graphs_serve_lengths_roles_and_new_weights(graphs):
    """One for each bucket that is crossed, whatever the prompts' width, role and weights."""
    model = make_model("gemma2", trained=True)  # layers with a window of 8 among them
    engine = RolloutEngine(model, graph=True, replay=False, bucket=16, batch_size=3, keep=10**9)
    ids, mask = pad_left(PROMPTS, PAD)
    for start in (0, 2, 5):  # prompts of 9, 7 and 4 columns at most, all widened to 16
        some = ids[:, start:], mask[:, start:]
        rows = some[1].sum(-1) == mask.sum(-1)
        inputs = some[0][rows], some[1][rows]
        for role in ("actor", "reference"):
            out = engine(model, *inputs, GREEDY, role=role, with_logprobs=True)
            expected = generate(model, *inputs, GREEDY, role=role, with_logprobs=True)
            assert torch.equal(out.query_responses, expected.query_responses)
            torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-5)
            engine.release()
        with torch.no_grad():
            for parameter in model.adapter_parameters("actor"):
                parameter.mul_(-1.5)
    # 7, then 6 prompts... three rows each time: 16 + 20 slots, to a multiple of 8, in two buckets
    assert engine._state.mask.shape == (3, 40)
    assert set(engine._graphs) == {32, 40} and Graph.captured == 2


def test_graphs_are_let_go_with_large_buffers(graphs):
    model = make_model("llama")
    ids, mask = pad_left(PROMPTS, PAD)
    for keep, kept in ((10**9, True), (1000, False)):
        engine = RolloutEngine(model, graph=True, replay=False, keep=keep)
        first = engine.generate(ids, mask, GREEDY)
        held = engine.nbytes
        assert held == 3 * 2 * 7 * 2 * 8 * 4 * engine._state.mask.shape[1]
        engine.release()
        assert bool(engine._graphs) == kept and engine.nbytes == (held if kept else 0)
        assert torch.equal(engine.generate(ids, mask, GREEDY).tokens, first.tokens)


def test_activations_of_widened_prompts_are_those_of_the_prompts(graphs):
    model = make_model("llama", trained=True, layers_to_transform=[2])
    ids, mask = pad_left(PROMPTS, PAD)
    engine = RolloutEngine(model, graph=True, replay=False, bucket=16)
    out = engine(model, ids, mask, GREEDY, keep_prefix=True)
    wanted = model.compute_prefix(out.query_responses, out.attention_mask)
    assert out.prefix.hidden.shape == wanted.hidden.shape
    counted = out.attention_mask.bool()
    torch.testing.assert_close(
        out.prefix.hidden[counted], wanted.hidden[counted], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_under_autocast_padding_stays_finite(family):
    """float32's lowest number is -inf in bfloat16, and a row of that is NaN."""
    model = make_model(family, trained=True, layers_to_transform=[2])
    ids, mask = pad_left(PROMPTS, PAD)
    engine = RolloutEngine(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = engine(model, ids, mask, GREEDY, with_logprobs=True, keep_prefix=True)
        scored = model.score(
            out.query_responses, out.attention_mask, out.response_mask, roles=("actor",)
        )
        wanted = model.compute_prefix(out.query_responses, out.attention_mask)
    assert out.prefix.hidden.dtype == wanted.hidden.dtype
    assert engine._state.mask.dtype == torch.bfloat16 and engine._state.mask.isfinite().all()
    assert out.prefix.hidden.isfinite().all()
    # 8 bits of mantissa through three blocks
    torch.testing.assert_close(out.logprobs, scored.logprobs, rtol=0, atol=0.15)


def test_every_position_of_a_prompt_sees_one_and_tokens_see_no_padding():
    """Nothing seen is NaN to some kernels of attention, and that spreads as 0 times NaN."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for masks in prefill_masks(mask, torch.float32, 2), prefill_masks(mask, torch.float32, None):
        for seen in (each.squeeze(1) == 0 for each in masks):
            assert seen.any(-1).all()
            assert not seen[0, 3:, :3].any() and seen[0, 5, 4:].all()
            assert not seen.triu(1).any()


def test_a_capture_reads_weights_and_not_autocast_s_copies_of_them(monkeypatch):
    """Those of trained weights go when autocast ends: a graph that reads them obeys nobody."""
    engine = prepared("llama", PLAIN)
    cached = []
    monkeypatch.setattr(
        engine, "_token", lambda *_: cached.append(torch.is_autocast_cache_enabled())
    )
    with stand_ins_for_streams(monkeypatch), torch.autocast("cpu", dtype=torch.bfloat16):
        engine._capture(engine._state, 16, PLAIN)
        assert cached == [False] * 3 and torch.is_autocast_cache_enabled()


def test_every_capture_is_on_one_stream_of_its_device(monkeypatch):
    """For each that it has run on, cuBLAS keeps a workspace."""
    engine = prepared("llama", PLAIN)
    monkeypatch.setattr(engine, "_token", lambda *_: None)
    with stand_ins_for_streams(monkeypatch) as used:
        for seen in (16, 32):
            engine._capture(engine._state, seen, PLAIN)
    assert len(used) == 4 and len({id(stream) for stream in used}) == 1
    assert used[0].device == torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "kind", "dtype", "capability", "waits"),
    [
        ("llama", None, torch.float16, (8, 0), False),
        ("mixtral", "grouped_mm", torch.bfloat16, (9, 0), False),
        ("mixtral", "grouped_mm", torch.bfloat16, (8, 0), True),
        ("mixtral", "grouped_mm", torch.float32, (9, 0), True),
        ("mixtral", "batched_mm", torch.float32, (8, 0), False),
        ("mixtral", "eager", torch.bfloat16, (9, 0), True),
    ],
)
def test_steps_in_which_the_host_sizes_products_are_not_captured(
    family, kind, dtype, capability, waits, monkeypatch, caplog
):
    model = make_model(family, ("joint",))
    model.base.to(dtype)
    if kind is not None:
        model.causal_lm.config._experts_implementation = kind
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _is_captured(model) != waits
    assert ("without CUDA graphs" in caplog.text) == waits


@contextlib.contextmanager
def stand_ins_for_streams(monkeypatch):
    """Gives the streams that are warmed up on and captured on."""
    used = []

    def stream(device=None):
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    def entered(stream):
        used.append(stream)
        return contextlib.nullcontext()

    for name in ("Stream", "current_stream", "CUDAGraph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, stream)
    monkeypatch.setattr(torch.cuda, "device", lambda of: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, side, mode: entered(side))
    _side_stream.cache_clear()
    yield used
    _side_stream.cache_clear()
