"""What a shared prefix is said to save, against operations that were counted."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from hydra_rlhf import ppo
from hydra_rlhf import trunk as trunks
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.methods import method_from_model
from hydra_rlhf.model import HydraModel
from tests.rlhf.families import CONFIGS, make_lm, make_tokenizer

PROMPTS = [" ".join(["w5"] * (7 - i)) for i in range(4)]


def of_rotary_tables(counter: FlopCounterMode) -> int:
    """Of no block. Some transformers make them as a product, and for a prefix once more."""
    return sum(
        count
        for module, counts in counter.get_flop_counts().items()
        if module.rsplit(".", 1)[-1] in ("rotary_emb", "LlamaRotaryEmbedding")
        for count in counts.values()
    )


@pytest.mark.parametrize(
    ("family", "method", "mini_batches"), [("llama", "lora-ppo", 2), ("gpt2", "j-hydra-ppo", 1)]
)
def test_flops_saved_are_those_that_were_not_done(family, method, mini_batches):
    """By torch's counter, a whole step with the prefix shared and one without.

    Attention is eager, because the counter does not know a CPU's fused one.
    """
    counted = {}
    for share in (True, False):
        config = PPOConfig(
            method=method,
            share_prefix=share,
            lora_last_k=1,
            lora_r=4,
            max_steps=1,
            num_ppo_epochs=2,
            num_mini_batches=mini_batches,
            per_device_train_batch_size=2,
            response_length=6,
        )
        lm = transformers.AutoModelForCausalLM.from_config(
            CONFIGS[family](), attn_implementation="eager"
        )
        source = HydraModel(lm.eval(), reward_head=torch.nn.Linear(32, 1, bias=False))
        models = method_from_model(method, source, lora=config)
        prompts = PROMPTS[: config.local_batch_size]
        with FlopCounterMode(display=False) as counter:
            result = ppo.train(config, models, make_tokenizer(), prompts)
        counted[share] = counter.get_total_flops() - of_rotary_tables(counter)
        if share:
            said = result.metrics[0]["reuse/prefix_flops_saved"]
    assert said == counted[False] - counted[True] > 0


def test_of_experts_those_that_a_token_is_sent_to():
    lm = make_lm("mixtral")  # two of four experts, 48 wide, gated; D = 32, heads 4 and 2 of 8
    attention = 2 * 32 * 32 + 2 * 32 * 16
    experts = 2 * 3 * 32 * 48
    router = 4 * 32
    weights = attention + experts + router
    assert trunks.flops(lm.model, 0, 2, 3, 5) == 2 * 3 * 5 * (2 * weights + 4 * 5 * 32)
