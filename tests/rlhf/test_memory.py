"""The plan against bytes that were really allocated, and its parts by hand."""

import gc
import json

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import hydra_kernels
from hydra_rlhf import cli, memory, ppo
from hydra_rlhf import ledger as ledgers
from hydra_rlhf.commands import plan as plan_command
from hydra_rlhf.config import METHODS, PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.ledger import Ledger
from hydra_rlhf.methods import method_from_model
from hydra_rlhf.model import HydraModel
from hydra_rlhf.phases import Phases, reset_peak_resident, resident
from tests.rlhf.families import CONFIGS, FAMILIES, make_tokenizer

PROMPT, RESPONSE, BATCH = 16, 16, 8


def settings(method, **changes):
    small = dict(
        lora_r=8,
        per_device_train_batch_size=BATCH,
        response_length=RESPONSE,
        max_steps=2,
        num_ppo_epochs=1,
        temperature=1.0,
    )
    return PPOConfig(method=method, **{**small, **changes})


def wide(family):
    """Wide enough that tensors, not python objects, are what is counted."""
    config = CONFIGS[family]()
    config.update({"hidden_size": 64, "vocab_size": 257, "num_hidden_layers": 4})
    kinds = getattr(config, "layer_types", None)
    if kinds:  # of the layers that there were
        config.layer_types = (2 * kinds)[:4]
    return config


def allocations(call):
    """(result, bytes held more than before, peak above before), by torch's allocator."""
    gc.collect()  # what an earlier profile saw made must not be seen freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, size in moves:
        live += size
        peak = max(peak, live)
    return result, live, peak


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        *(("llama", method, {}) for method in METHODS),
        ("llama", "hydra-ppo", {"gradient_checkpointing": True}),
        ("llama", "hydra-ppo", {"lora_last_k": 2}),
        ("gpt2", "j-hydra-ppo", {}),
        ("opt", "hydra-ppo", {}),
        # Accumulated over microbatches; the widths of windows alternate.
        ("gemma2", "ppo", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        ("qwen3", "lora-ppo", {"kl_estimator": "exact", "dtype": "bfloat16"}),
        ("mixtral", "hydra-ppo", {"dtype": "bfloat16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_plan_is_what_is_allocated(family, method, changes):
    """Static bytes to 1%, the peak of a run to 10%."""
    model_config, config = wide(family), settings(method, **changes)
    planned = memory.plan(model_config, config, prompt_length=PROMPT, device="cpu")
    dtype = getattr(torch, config.dtype or "float32")
    lm = transformers.AutoModelForCausalLM.from_config(model_config, dtype=dtype).eval()
    head = lm.get_output_embeddings().weight
    width = head.shape[1]
    # On its first call at a shape the op tries BLAS, which is no part of a run's memory.
    hidden = torch.zeros(1, width, dtype=dtype, requires_grad=True)
    targets = torch.zeros(1, dtype=torch.long)
    hydra_kernels.linear_logprob(hidden, head.detach(), targets).logprobs.sum().backward()
    source = HydraModel(lm, reward_head=torch.nn.Linear(width, 1, bias=False))
    models, static, _ = allocations(lambda: method_from_model(method, source, lora=config))
    assert planned.static == pytest.approx(static, rel=0.01)
    # Of mixed lengths: without padding attention needs no mask and no copies of its keys.
    prompts = [" ".join(["w5"] * (PROMPT - i)) for i in range(BATCH)]
    _, _, peak = allocations(lambda: ppo.train(config, models, make_tokenizer(), prompts))
    assert planned.peak == pytest.approx(static + peak, rel=0.10)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_planned(family):
    plans = memory.plan_methods(CONFIGS[family](), settings("ppo"), prompt_length=PROMPT)
    by = {p.method: p for p in plans}
    one = by["hydra-ppo"].weights
    # Four models, four, two, one and one.
    assert [p.weights / one for p in plans] == [4, 4, 2, 1, 1]
    assert by["hydra-ppo"].adapters == by["lora-ppo"].adapters == 2 * by["j-hydra-ppo"].adapters
    assert by["ppo"].adapters == 0
    assert by["hydra-ppo"].gradients > by["j-hydra-ppo"].gradients
    assert by["ppo"].peak > by["lora-ppo"].peak > by["d-lora-ppo"].peak > by["hydra-ppo"].peak


def test_experts_are_planned_in_the_dtypes_that_torch_has_shapes_for():
    """bfloat16 in every torch; float32 from one after 2.13 on, and before it the plan says so."""
    config = CONFIGS["mixtral"]()
    halves = memory.plan(config, settings("hydra-ppo", dtype="bfloat16"), prompt_length=PROMPT)
    assert halves.peak > halves.weights > 0
    try:
        whole = memory.plan(config, settings("hydra-ppo", dtype="float32"), prompt_length=PROMPT)
    except UserError as error:
        assert str(error).startswith("cannot plan for mixtral in float32: ")
    else:
        assert whole.weights == pytest.approx(2 * halves.weights, rel=0.01)


def test_what_torch_has_no_shapes_for_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no shapes\nand a page more")

    monkeypatch.setattr(memory, "models_on_meta", refuse)
    with pytest.raises(UserError, match="^cannot plan for llama in float32: no shapes$"):
        memory.plan(CONFIGS["llama"](), settings("hydra-ppo"), prompt_length=PROMPT)


def test_parts_by_hand():
    """A Llama whose weights are counted on paper."""
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    where = {"prompt_length": PROMPT, "device": "cpu"}
    p = memory.plan(config, settings("hydra-ppo", lora_r=4), **where)
    attention = 32 * 32 * 2 + 32 * 16 * 2
    mlp = 3 * 32 * 64
    block = attention + mlp + 2 * 32
    rotary = 2 * 4  # inv_freq and the copy of it, of head size 8
    assert p.weights == 4 * (2 * 100 * 32 + 2 * block + 32 + rotary)
    ranks = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert p.adapters == 4 * 2 * 2 * ranks
    assert p.heads == 4 * 2 * 32
    assert p.gradients == p.adapters + 4 * 32
    assert p.optimizer == 2 * p.gradients
    assert p.kv_cache == 4 * BATCH * (PROMPT + RESPONSE) * 2 * 2 * 2 * 8
    assert p.prefix == 0
    # A GPU's graphs are made for prompts of 256, and keep what is small beside the card.
    small, large = (
        memory.plan(config, settings("hydra-ppo", lora_r=4), prompt_length=PROMPT, card=card)
        for card in (20 * 557_055, 20 * 557_056)
    )
    assert small.kv_cache == 4 * BATCH * (256 + RESPONSE) * 2 * 2 * 2 * 8 == 557_056
    assert (large.score - small.score, large.update - small.update) == (557_056, 557_056)
    assert large.rollout == small.rollout
    some = memory.plan(config, settings("hydra-ppo", lora_last_k=1), **where)
    assert some.prefix == 4 * BATCH * (PROMPT + RESPONSE) * 32


def test_reuse_and_checkpointing_save_what_they_say():
    config, where = wide("llama"), {"prompt_length": 64, "device": "cpu"}
    plain = memory.plan(config, settings("hydra-ppo"), **where)
    changes = {"gradient_checkpointing": True}
    checkpointed = memory.plan(config, settings("hydra-ppo", **changes), **where)
    assert checkpointed.activations < 0.6 * plain.activations
    upper = memory.plan(config, settings("hydra-ppo", lora_last_k=2), **where)
    assert upper.activations < 0.6 * plain.activations
    bf16 = memory.plan(config, settings("hydra-ppo", dtype="bfloat16"), **where)
    assert bf16.weights == pytest.approx(plain.weights / 2, rel=0.01)


def test_largest_batch_fits_and_one_more_does_not():
    config = settings("hydra-ppo")
    model_config = wide("llama")
    budget = memory.plan(model_config, config, prompt_length=PROMPT).peak * 3

    def peak(batch):
        sized = settings(
            "hydra-ppo",
            per_device_train_batch_size=batch,
            local_rollout_forward_batch_size=batch,
        )
        return memory.plan(model_config, sized, prompt_length=PROMPT).peak

    best = memory.largest_batch(model_config, config, budget, prompt_length=PROMPT)
    assert best > BATCH
    assert peak(best) <= budget < peak(best + 1)
    few = memory.largest_batch(model_config, config, peak(3) + 1, prompt_length=PROMPT)
    assert few == 3


def test_what_no_batch_can_help_takes_one_plan(monkeypatch):
    taken = []
    walked = memory.Planner._walked
    monkeypatch.setattr(
        memory.Planner, "_walked", lambda *a, **k: taken.append(1) or walked(*a, **k)
    )
    model_config = wide("llama")
    assert memory.largest_batch(model_config, settings("hydra-ppo"), 1, prompt_length=PROMPT) == 0
    assert len(taken) == 1


def deep(family, layers=7, **changes):
    """More blocks than have to be run to know them all."""
    given = CONFIGS[family]().to_dict()
    given.pop("layer_types", None)
    given["n_layer" if "n_layer" in given else "num_hidden_layers"] = layers
    return type(CONFIGS[family]())(**{**given, **changes})


def experts(layers, **changes):
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    parts = dict(num_key_value_heads=2, num_experts=4, moe_intermediate_size=16)
    shared = dict(vocab_size=97, shared_expert_intermediate_size=16, dtype="bfloat16")
    given = {**sizes, **parts, **shared, **changes}
    return transformers.Qwen2MoeConfig(num_hidden_layers=layers, **given)


RECOMPUTED = {"gradient_checkpointing": True}
REENTRANT = {**RECOMPUTED, "use_reentrant": True}


@pytest.mark.parametrize(
    ("model_config", "method", "changes", "run"),
    [
        # Run: the first, one after it, one after one like itself, the last.
        (deep("llama"), "hydra-ppo", {}, [0, 1, 2, 6]),
        (deep("gpt2"), "ppo", RECOMPUTED, [0, 1, 2, 6]),
        (deep("llama"), "j-hydra-ppo", REENTRANT, [0, 1, 2, 6]),
        # Windows that alternate are masks, of one size.
        (deep("gemma2"), "d-lora-ppo", {}, [0, 1, 2, 6]),
        # One adapter in the middle: no gradient below it, and above it blocks without adapters.
        (
            deep("llama", 10),
            "hydra-ppo",
            {"lora_layers_to_transform": [4], "share_prefix": False},
            [0, 1, 2, 4, 5, 6, 9],
        ),
        (deep("llama", 9), "lora-ppo", {"lora_last_k": 5}, [0, 1, 2, 4, 5, 6, 8]),
        # Two dense blocks before the experts; a dense block before each block of experts.
        (experts(9, mlp_only_layers=[0, 1]), "j-hydra-ppo", RECOMPUTED, [0, 1, 2, 3, 8]),
        (experts(10, decoder_sparse_step=2), "hydra-ppo", {}, [0, 1, 2, 3, 8, 9]),
    ],
    ids=lambda v: getattr(v, "model_type", v if isinstance(v, str) else None),
)
def test_blocks_that_are_alike_are_run_once(monkeypatch, model_config, method, changes, run):
    """And the plan is that of running them all, to the byte."""
    config = settings(
        method,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **changes,
    )
    found = set()
    enter = Ledger.enter
    monkeypatch.setattr(Ledger, "enter", lambda *a: found.add(a[1]) or enter(*a))
    planned = memory.plan(model_config, config, prompt_length=5)
    assert sorted(found) == run
    all_of_them = memory.Planner(model_config, config, prompt_length=5)
    all_of_them._twins = False
    assert all_of_them.plan() == planned


def test_blocks_that_only_look_alike_are_all_run(monkeypatch):
    forward = transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward
    config = settings("hydra-ppo", per_device_train_batch_size=2)
    expected = memory.plan(deep("llama"), config, prompt_length=5)
    given = ledgers._shapes_of
    calls = []

    def other(args, kwargs):
        calls.append(1)
        return [*given(args, kwargs), len(calls)]

    monkeypatch.setattr(ledgers, "_shapes_of", other)
    found = set()
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaDecoderLayer,
        "forward",
        lambda self, *a, **k: found.add(self.self_attn.layer_idx) or forward(self, *a, **k),
    )
    assert memory.plan(deep("llama"), config, prompt_length=5) == expected
    assert found == set(range(7))


def test_separate_reward_models():
    policy, small = wide("llama"), wide("llama")
    small.update({"hidden_size": 32, "intermediate_size": 16})
    one, other = (
        memory.plan(kind, settings("hydra-ppo"), prompt_length=PROMPT).weights
        for kind in (policy, small)
    )

    def weights(method, reward_config=None, **changes):
        config = settings(method, **changes)
        given = {"prompt_length": PROMPT, "reward_config": reward_config}
        return memory.plan(policy, config, **given).weights

    # Critic and reward are as large as the reward model.
    assert weights("lora-ppo", small) == weights("ppo", small) == 2 * one + 2 * other
    assert weights("d-lora-ppo", small) == one + other
    # A function takes the place of one model, and a classifier is held in its place.
    assert weights("lora-ppo", reward_fn="module:function") == 3 * one
    small.architectures = ["LlamaForSequenceClassification"]
    head = 4 * 32 * (2 - small.vocab_size)  # two labels in the place of the vocabulary
    assert weights("lora-ppo", small) == 3 * one + other + head
    assert weights("hydra-ppo", small) == one + other + head


def test_parts_add_up_to_the_peak():
    config = settings("hydra-ppo", lora_last_k=2)
    for prompt_length, device in ((4, "cuda"), (64, "cuda"), (64, "cpu")):
        p = memory.plan(wide("llama"), config, prompt_length=prompt_length, device=device)
        parts = p.at_peak()
        assert sum(parts.values()) == p.peak == getattr(p, p.peak_phase)
        assert all(size >= 0 for size in parts.values())
        assert parts["gradients"] == (p.gradients if p.peak_phase == "update" else 0)
        assert p.kept == p.prefix + (p.kv_cache if device == "cuda" else 0)


def test_ledger_counts_storages_once():
    ledger = Ledger()
    with ledger:
        a = torch.empty(1000)
        b = a.view(10, 100).t()
        a.add_(1.0)
        assert (ledger.live, ledger.peak) == (4000, 4000)
        c = a + 1
        del c
        assert (ledger.live, ledger.peak) == (4000, 8000)
        del a
        assert ledger.live == 4000, "the view holds it"
        del b
        assert ledger.live == 0


def test_phases_time_and_measure():
    phases = Phases(torch.device("cpu"))
    with phases("first"):
        held = torch.ones(8 << 20)
    with phases("second"):
        pass
    with phases("first"):
        pass
    metrics = phases.metrics()
    assert metrics["time/first"] > 0
    if reset_peak_resident() and resident()[0]:
        assert metrics["memory/first_peak"] >= 32 << 20
    del held
    phases.clear()
    assert phases.metrics() == {}


def test_phases_add_up_seconds_and_keep_the_highest_peak(monkeypatch):
    phases = Phases(torch.device("cpu"))
    seconds, sizes, resets = iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0]), iter(range(1, 10)), []
    monkeypatch.setattr("hydra_rlhf.phases.time.perf_counter", lambda: next(seconds))
    monkeypatch.setattr(phases, "_reset_peak", lambda: resets.append(1))
    monkeypatch.setattr(phases, "_bytes", lambda: (next(sizes), peaks.pop(0)))
    peaks = [90, 40, 60]
    with phases("update"):
        pass
    with phases("update"):
        pass
    expected = {"time/update": 5.0, "memory/update_held": 2.0, "memory/update_peak": 90.0}
    assert phases.metrics() == expected
    phases.clear()
    with phases("update"):
        pass
    expected = {"time/update": 1.0, "memory/update_held": 3.0, "memory/update_peak": 60.0}
    assert phases.metrics() == expected and len(resets) == 3


def test_command(tmp_path, capsys):
    model_config = CONFIGS["llama"]()
    model_config.update({"num_hidden_layers": 1})
    model_config.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--lora_r", "4", "--prompt_length", "16"]
    chart = tmp_path / "plan.png"
    assert cli.main([*arguments, "--card_gb", "2", "--chart", str(chart)]) == 0
    printed = capsys.readouterr().out
    for word in (*METHODS, "KV cache", "largest batch", "fits"):
        assert word in printed
    assert chart.read_bytes()[:4] == b"\x89PNG"
    assert "does not fit" not in printed and "Not counted" in printed
    assert cli.main([*arguments, "--card_gb", "2", "--json", "--chart", str(chart)]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert plans["budget"] == 10**9 and set(plans["methods"]) == set(METHODS)
    for p in plans["methods"].values():
        assert p["fits"] and p["largest_batch"] >= p["batch_size"]
        assert p["peak"] == max(p["rollout"], p["score"], p["update"])
    for bad, message in (
        (["plan", str(tmp_path / "nothing")], "cannot load a configuration"),
        ([*arguments, "--card_gb", "0.5"], "is not above reserve_gb"),
        ([*arguments, "--chart", str(tmp_path / "no" / "x.png")], "there is no folder"),
    ):
        assert cli.main(bad) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(UserError, match="method must be one of"):
        memory.plan(CONFIGS["llama"](), settings("grpo"))


def test_what_does_not_fit_is_told_what_would():
    config = settings("lora-ppo", lora_last_k=2, gradient_checkpointing=True)
    p = memory.plan(wide("llama"), config, prompt_length=64)
    said = plan_command.way_out(p, config, p.peak - 1, 7)
    assert f"a batch of {BATCH} takes" in said and "in the rollout phase" in said
    assert "try a batch of 7, with --gradient-accumulation-steps for more" in said
    assert "--gradient-checkpointing" not in said and "--lora-last-k" not in said
    plain = settings("hydra-ppo")
    said = plan_command.way_out(p, plain, p.peak - 1, 0)
    assert "--per-device-train-batch-size 1 with" in said
    assert "--gradient-checkpointing" in said and "--lora-last-k" in said
    said = plan_command.way_out(p, config, p.static + p.optimizer, 0)
    assert "alone are 0.0 GB, whatever the batch" in said
    assert "--dtype bfloat16, hydra-ppo or j-hydra-ppo" in said and "--lora-r below 8" in said
