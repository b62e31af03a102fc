"""The rollout engine on a GPU: captured steps beside the same steps called one by one.

tests/rlhf/test_device_step.py has what can be seen of it without a GPU.
"""

import threading

import pytest
import torch

from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.rollout import Sampling, generate, pad_left
from tests.rlhf.families import EOS, FAMILIES, PAD, make_model
from tests.rlhf.test_engine import GREEDY, PROMPTS

pytestmark = pytest.mark.gpu
SAMPLED = Sampling(20, 0.7, (EOS, 13), PAD, top_k=20, top_p=0.9, min_p=0.01, min_response_length=3)
PLAIN = Sampling(20, 0.7, (EOS, 13), PAD)


def gpu_model(family: str, dtype=torch.float32, **options):
    model = make_model(family, ("joint",), trained=True, **options)
    model.base.to(dtype)  # the heads stay float32
    return model.to("cuda")


def gpu_prompts():
    return tuple(t.cuda() for t in pad_left(PROMPTS, PAD))


def fill_free_memory() -> None:
    """NaN wherever the allocator would put what it believes to be free."""
    junk = [torch.full((n,), torch.nan, device="cuda") for n in (64, 4096, 1 << 18, 1 << 20) * 8]
    del junk


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_captured_steps_are_the_steps(family, dtype):
    """Lengths cross two buckets, rows take turns, and everything that a step can write is asked."""
    model = gpu_model(family, dtype, layers_to_transform=[1, 2])
    ids, mask = gpu_prompts()
    engines = [
        RolloutEngine(model, bucket=16, batch_size=3, check_every=3, graph=graph, keep=10**9)
        for graph in (True, False)
    ]
    for sampling in (SAMPLED, PLAIN, GREEDY):
        for repeat in range(2):  # the second time by graphs alone
            outs = []
            for engine in engines:
                out = engine.generate(
                    ids, mask, sampling, seeds=range(7), values=True, keep_prefix=True
                )
                outs.append(out)
                engine.release()
                fill_free_memory()
            captured, called = outs
            assert torch.equal(captured.tokens, called.tokens), (sampling, repeat)
            assert torch.equal(captured.lengths, called.lengths)
            # Wider prompts sum in another order.
            atol = 1e-4 if dtype == torch.float32 else 0.1
            for name in ("logprobs", "sampled_logprobs", "values"):
                torch.testing.assert_close(
                    getattr(captured, name), getattr(called, name), rtol=0, atol=atol
                )
            assert captured.prefix.hidden.shape == called.prefix.hidden.shape
            assert captured.prefix.hidden.isfinite().all()
        assert len(engines[0]._graphs) == 2


def test_greedy_equals_generate_on_the_gpu():
    for family in FAMILIES:
        model = gpu_model(family)
        ids, mask = gpu_prompts()
        out = RolloutEngine(model, bucket=16)(model, ids, mask, GREEDY, with_logprobs=True)
        expected = generate(model, ids, mask, GREEDY, with_logprobs=True)
        assert torch.equal(out.query_responses, expected.query_responses), family
        torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_are_decoded(dtype):
    """By graphs, or by calls where the host sizes their products."""
    model = gpu_model("mixtral", dtype)
    ids, mask = gpu_prompts()
    engines = [RolloutEngine(model, bucket=16, graph=graph, keep=10**9) for graph in (None, False)]
    captured, called = (engine.generate(ids, mask, GREEDY) for engine in engines)
    assert bool(engines[0]._graphs) == engines[0].graph
    atol = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(captured.logprobs[:, 0], called.logprobs[:, 0], rtol=0, atol=atol)
    assert (captured.tokens == called.tokens).float().mean() > 0.9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "calls"])
def test_no_step_waits_for_the_device(family, graph):
    model = gpu_model(family)
    ids, mask = gpu_prompts()
    engine = RolloutEngine(model, bucket=64, graph=graph, keep=10**9)
    engine.generate(ids, mask, SAMPLED)
    state = engine._state
    state.finished.zero_()
    state.column.zero_()
    state.cache.slot.zero_()  # else past the buffers, which a GPU's process does not survive
    slots = state.mask.shape[1]  # what is called reads no bucket past them
    with torch.no_grad(), model.no_dropout(), engine._adapters(0):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                engine._step(next(iter(engine._graphs), slots), SAMPLED)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_graphs_obey_new_weights_and_roles():
    model = make_model("llama", trained=True).cuda()
    ids, mask = gpu_prompts()
    engine = RolloutEngine(model, bucket=16, keep=10**9)
    optimizer = torch.optim.AdamW(model.adapter_parameters("actor"), lr=0.05)
    seen, graphs = [], None
    for role in ("actor", "reference", "actor", "reference"):
        out = engine(model, ids, mask, GREEDY, role=role).query_responses
        assert torch.equal(out, generate(model, ids, mask, GREEDY, role=role).query_responses)
        seen.append(out)
        graphs = graphs or dict(engine._graphs)
        assert engine._graphs == graphs, "captured again"
        for parameter in model.adapter_parameters("actor"):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        fill_free_memory()
    assert torch.equal(seen[1], seen[3])
    assert seen[0].shape != seen[2].shape or not torch.equal(seen[0], seen[2])


def test_buffers_and_pools_are_given_back():
    model = gpu_model("llama")
    ids, mask = gpu_prompts()
    engine = RolloutEngine(model, bucket=16, keep=0)
    engine.generate(ids, mask, GREEDY)  # libraries' own workspaces
    engine.release()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    engine.generate(ids, mask, GREEDY)
    assert torch.cuda.memory_allocated() >= before[0] + engine.nbytes > before[0]
    engine.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before[0] + 4096
    assert torch.cuda.memory_reserved() <= before[1]


def test_another_thread_may_allocate_while_a_step_is_captured():
    model = gpu_model("llama")
    ids, mask = gpu_prompts()
    stop = threading.Event()

    def pins():
        while not stop.is_set():
            torch.empty(1 << 16).pin_memory().to("cuda", non_blocking=True)

    thread = threading.Thread(target=pins)
    thread.start()
    try:
        out = RolloutEngine(model, bucket=8)(model, ids, mask, GREEDY)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(out.query_responses, generate(model, ids, mask, GREEDY).query_responses)


def test_under_autocast_padding_stays_finite():
    model = gpu_model("llama")
    ids, mask = gpu_prompts()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = RolloutEngine(model, bucket=16).generate(ids, mask, GREEDY)
    assert out.logprobs.isfinite().all()


def test_under_autocast_graphs_obey_trained_weights():
    """Autocast keeps copies of them for as long as it lasts, which a graph must not read."""
    model = make_model("llama", ()).to("cuda").requires_grad_()
    ids, mask = gpu_prompts()
    captured, called = (RolloutEngine(model, bucket=16, graph=g, keep=10**9) for g in (True, False))
    for _ in range(3):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outs = [engine.generate(ids, mask, GREEDY) for engine in (captured, called)]
        fill_free_memory()
        torch.testing.assert_close(outs[0].logprobs[:, 0], outs[1].logprobs[:, 0], rtol=0, atol=0.1)
        assert (outs[0].tokens == outs[1].tokens).float().mean() > 0.9
        with torch.no_grad():
            for parameter in model.base.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))


def test_runs_where_the_model_is():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a machine with two GPUs: one current, one with the model")
    model = make_model("llama", trained=True).to("cuda:1")
    ids, mask = (t.to("cuda:1") for t in pad_left(PROMPTS, PAD))
    with torch.cuda.device(0):
        out = RolloutEngine(model, bucket=16)(model, ids, mask, GREEDY)
    assert torch.equal(out.query_responses, generate(model, ids, mask, GREEDY).query_responses)


def test_continuous_batching_on_the_gpu():
    from hydra_rlhf.continuous_rollout import ContinuousEngine
    from hydra_rlhf.errors import UserError

    try:
        engine = ContinuousEngine()
    except UserError as old:
        pytest.skip(f"needs a GPU and a newer transformers: {old}")
    model = make_model("llama", trained=True).cuda()
    ids, mask = gpu_prompts()
    for role in ("actor", "reference"):
        out = engine(model, ids, mask, GREEDY, role=role, with_logprobs=True)
        expected = generate(model, ids, mask, GREEDY, role=role, with_logprobs=True)
        assert torch.equal(out.query_responses, expected.query_responses)
        torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-4)
