"""Prompts in, sequences with explicit lengths out; and where scores come from."""

import copy
import logging
import math
import sys

import pytest
import torch
import transformers
from tokenizers import processors

from hydra_rlhf import pairs
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.rewards import (
    AdaptiveKLController,
    RunningMoments,
    call_reward_fn,
    load_reward_fn,
    shape_scores,
)
from hydra_rlhf.rollout import (
    Sampling,
    decode,
    encode_prompts,
    generate,
    pad_left,
    sampling_of,
    stop_token_ids,
)
from tests.rlhf.families import EOS, PAD, THREE, make_lm, make_model, make_tokenizer

CPU = torch.device("cpu")


def test_prompts_are_padded_on_the_left():
    ids, mask = encode_prompts(make_tokenizer(), ["w5", "w6 w7 w8"])
    assert ids.tolist() == [[PAD, PAD, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    ids, mask = pad_left([[4], [5, 6]], pad_id=9)
    assert ids.tolist() == [[9, 4], [5, 6]] and mask.tolist() == [[0, 1], [1, 1]]


def test_chat_template_is_one_user_turn():
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}w90 {{ m.content }} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}w91{% endif %}"
    )
    ids, _ = encode_prompts(tokenizer, ["w5 w6"], apply_chat_template=True)
    assert ids.tolist() == [[90, 5, 6, 91]]
    assert encode_prompts(tokenizer, ["w5 w6"])[0].tolist() == [[5, 6]]


def test_a_prompt_with_bos_written_out_gets_no_second_one():
    """As a chat template leaves it; PPO and SFT encode alike."""
    backend = copy.deepcopy(make_tokenizer().backend_tokenizer)
    backend.post_processor = processors.TemplateProcessing(
        single="w95 $A", special_tokens=[("w95", 95)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="w95"
    )
    prompts = ["w95 w5 w6", "w5 w6", "w95"]
    expected = [[95, 5, 6], [95, 5, 6], [95]]
    assert pairs.encode_prompts(tokenizer, prompts) == expected
    for prompt, ids in zip(prompts, expected, strict=True):
        assert encode_prompts(tokenizer, [prompt])[0].tolist() == [ids]
    with pytest.raises(UserError, match="no chat template"):
        encode_prompts(tokenizer, prompts, apply_chat_template=True)


def test_an_eos_that_the_tokenizer_appends_is_taken_off():
    class Closing:
        eos_token_id, pad_token_id = EOS, PAD

        def encode(self, text, **_):
            return [5, 6, EOS]

    assert encode_prompts(Closing(), ["any"])[0].tolist() == [[5, 6]]


def test_stop_tokens():
    tokenizer = make_tokenizer()
    assert stop_token_ids(tokenizer, "eos") == (EOS,)
    assert stop_token_ids(tokenizer, None) == (EOS,)
    assert stop_token_ids(tokenizer, "w7") == (EOS, 7)
    assert stop_token_ids(tokenizer, "eos", 8) == (EOS, 8)


@pytest.mark.parametrize("family", THREE)
def test_custom_stop_token_ends_a_response(family):
    """Wherever it is sampled it is the last token, and the text has it not."""
    model = make_model(family, trained=True)
    tokenizer = make_tokenizer()
    ids, mask = encode_prompts(tokenizer, ["w5", "w6 w7 w8"] * 8)
    stops = tuple(range(40, 60))
    torch.manual_seed(0)
    rollout = generate(model, ids, mask, Sampling(8, 1.0, (EOS, *stops), PAD))
    lengths = rollout.response_mask.sum(-1)
    assert rollout.ended.any() and (lengths[~rollout.ended] == rollout.response_mask.shape[1]).all()
    responses = rollout.query_responses[:, rollout.context_length :]
    texts = decode(tokenizer, rollout)
    for row, length, ended, text in zip(responses, lengths, rollout.ended, texts, strict=True):
        kept = row[:length].tolist()
        inner = kept[:-1] if ended else kept
        assert not set(inner) & {EOS, *stops}
        assert (kept[-1] in (EOS, *stops)) == bool(ended)
        assert (row[length:] == PAD).all()
        assert len(text.split()) == sum(token != 2 and token > 1 for token in inner)
    total = rollout.attention_mask.sum(-1)
    assert torch.equal(total, mask.sum(-1) + lengths)


def test_greedy_is_deterministic_and_roles_differ():
    model = make_model("llama", trained=True)
    ids, mask = encode_prompts(make_tokenizer(), ["w5 w6", "w7"])
    greedy = Sampling(6, 1.0, (EOS,), PAD, do_sample=False)
    first, again = (generate(model, ids, mask, greedy) for _ in range(2))
    assert torch.equal(first.query_responses, again.query_responses)
    reference = generate(model, ids, mask, greedy, role="reference")
    assert reference.query_responses.tolist() != first.query_responses.tolist()
    base = make_lm("llama")
    expected = base.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=PAD
    )
    width = expected.shape[1]
    assert torch.equal(reference.query_responses[:, :width], expected)


def test_the_checkpoints_generation_settings_do_not_leak_in():
    """A repetition penalty in generation_config.json would take the sampler off the policy."""
    lm = make_lm("llama")
    lm.generation_config.repetition_penalty = 5.0
    lm.generation_config.top_k = 1
    model = HydraModel(lm)
    ids, mask = encode_prompts(make_tokenizer(), ["w5 w6"] * 16)
    torch.manual_seed(0)
    rollout = generate(model, ids, mask, Sampling(6, 1.0, (EOS,), PAD), with_logprobs=True)
    scored = model.score(
        rollout.query_responses, rollout.attention_mask, rollout.response_mask, roles=("actor",)
    )
    torch.testing.assert_close(rollout.logprobs, scored.logprobs, atol=1e-4, rtol=0)
    assert len({tuple(row) for row in rollout.query_responses.tolist()}) > 1, "top_k 1 was used"
    assert lm.generation_config.repetition_penalty == 5.0


def test_off_policy_samplers_are_announced(caplog):
    with caplog.at_level(logging.WARNING, "hydra_rlhf"):
        sampling_of(PPOConfig(), make_tokenizer())
        assert not caplog.records
        sampling_of(PPOConfig(top_p=0.9, min_response_length=3), make_tokenizer())
    assert "top_p is 0.9, not 1; min_response_length is 3, not 0" in caplog.text


def test_missing_eos_rules_by_hand():
    scores, ended = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert shape_scores(scores, ended, missing_eos_penalty=0.5).tolist() == [1.0, 1.5]
    assert shape_scores(scores, ended, missing_eos_score=-1.0).tolist() == [1.0, -1.0]
    assert shape_scores(scores, ended, clip=1.5).tolist() == [1.0, 1.5]


def test_running_moments_are_those_of_everything_seen():
    torch.manual_seed(0)
    batches = [torch.randn(n) * 3 + 5 for n in (4, 1, 7)]
    moments = RunningMoments()
    for part in batches:
        moments.update(part)
    every = torch.cat(batches).double()
    assert moments.mean == pytest.approx(float(every.mean()))
    assert moments.std == pytest.approx(float(every.std()), rel=1e-6)
    scaled = shape_scores(batches[0], torch.ones(4).bool(), moments=moments, center=True)
    expected = (batches[0] - moments.mean) / (moments.std + 1e-8)
    torch.testing.assert_close(scaled, expected.to(scaled.dtype))


def test_adaptive_kl_controller_by_hand():
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100.0)
    controller.update(12.0, 10)  # error clipped to 0.2: 0.1 * (1 + 0.2 * 0.1)
    assert controller.value == pytest.approx(0.102)
    controller.update(5.4, 50)  # error -0.1: 0.102 * (1 - 0.1 * 0.5)
    assert controller.value == pytest.approx(0.0969)


def test_reward_functions_are_found_and_checked(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text("def f(prompts, completions):\n    return [1, 2]\n")
    monkeypatch.chdir(tmp_path)
    fn = load_reward_fn("my_reward:f")
    scores = call_reward_fn(fn, ["a", "b"], ["c", "d"], {"unused": [0, 0]}, CPU)
    assert scores.tolist() == [1.0, 2.0] and scores.dtype == torch.float32
    for spec, message in (
        ("my_reward", "must be module:function"),
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        ("my_reward:g", "has no function g"),
        ("./my_reward:f", "must be module:function or file.py:function, got './my_reward:f'"),
        ("./no_such.py:f", "there is no file ./no_such.py"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward_fn(spec)
    with pytest.raises(UserError, match="gave inf for 'd' after 'b'"):
        call_reward_fn(lambda **_: [1.0, math.inf], ["a", "b"], ["c", "d"], {}, CPU)


def test_a_reward_function_in_a_file_elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "rewards"
    folder.mkdir()
    (folder / "scale_of_a_reward.py").write_text("SCALE = 3.0\n")
    (folder / "reward_in_a_file.py").write_text(
        "from scale_of_a_reward import SCALE\n\n"
        "def f(prompts, completions):\n    return [SCALE] * len(prompts)\n"
    )
    (folder / "json.py").write_text("def f(prompts, completions):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    for spec in ("rewards/reward_in_a_file.py:f", f"{folder}/reward_in_a_file.py:f"):
        assert load_reward_fn(spec)(["a"], ["b"]) == [3.0]
    with pytest.raises(UserError, match=r"rewards/json\.py has the name of a module"):
        load_reward_fn("rewards/json.py:f")


@pytest.mark.parametrize(
    "scores, message",
    [
        (lambda: [1.0], "<lambda> gave 1 scores for 2 responses .*first is 'c' after 'a'"),
        (lambda: [1.0] * 3, "gave 3 scores for 2 responses .*first is 'c' after 'a'"),
        (lambda: 1 / 0, "raised ZeroDivisionError: division by zero .*first is 'c' after 'a'"),
        (lambda: ["high"] * 2, r"gave \['high', 'high'\], not a list of .* \(could not convert"),
        (lambda: [None] * 2, r"gave \[None, None\], not a list of one number a response"),
        (lambda: 0.5, "gave 0.5, not a list of one number a response"),
        (lambda: (1 / 0 for _ in "ab"), "raised ZeroDivisionError: .*first is 'c' after 'a'"),
        (lambda: [0.0, math.nan], "gave nan for 'd' after 'b'"),
    ],
)
def test_what_a_reward_function_did_wrong_is_named_with_the_sample(scores, message):
    with pytest.raises(UserError, match=message):
        call_reward_fn(lambda **_: scores(), ["a", "b"], ["c", "d"], {}, CPU)


def test_where_a_reward_function_raised_and_how_it_is_called(tmp_path, monkeypatch):
    text = "import json\n\n\ndef f(prompts, completions):\n    return json.loads('{')\n"
    (tmp_path / "reward_that_raises.py").write_text(text)
    monkeypatch.setattr("sys.path", list(sys.path))
    raises = load_reward_fn(f"{tmp_path}/reward_that_raises.py:f")
    with pytest.raises(UserError, match=r"JSONDecodeError: .* in reward_that_raises.py, line 5 \("):
        call_reward_fn(raises, ["a"], ["b"], {}, CPU)
    with pytest.raises(UserError, match="TypeError: .*; it is called with the lists prompts= and"):
        call_reward_fn(lambda samples: [1.0], ["a"], ["b"], {}, CPU)
