"""What is trained on: the bundled task, and files, folders and Hub sets in the known formats."""

from hydra_rlhf.data.example import Demonstration, Preference, Prompt
from hydra_rlhf.data.lengths import limit_length
from hydra_rlhf.data.loading import (
    iter_preferences,
    iter_prompts,
    iter_sft,
    load_preferences,
    load_prompts,
    load_sft,
)

__all__ = [
    "Demonstration",
    "Preference",
    "Prompt",
    "iter_preferences",
    "iter_prompts",
    "iter_sft",
    "limit_length",
    "load_preferences",
    "load_prompts",
    "load_sft",
]
