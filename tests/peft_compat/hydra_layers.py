"""A pytest plugin that puts our layers into PEFT's own tests: ``-p hydra_layers``.

HYDRA_PEFT_WAY names the way in: "fuse", "register", "context", or "stock" for none. Tests that are
parametrised with the config of a method other than LoRA are left out, and all but every
HYDRA_PEFT_EVERY-th of the rest. At the end of the session the forwards of our layers are counted
into the file HYDRA_PEFT_COUNTS: those on the fast path, and the rest by what they asked for.
"""

import json
import os
from collections import Counter, defaultdict

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from hydra_kernels import peft as hydra_peft
from tests import testing_utils  # PEFT's

WAY = os.environ.get("HYDRA_PEFT_WAY", "stock")
EVERY = int(os.environ.get("HYDRA_PEFT_EVERY", "1"))
counts = Counter()


def count_forwards():
    forward, fast = hydra_peft.FusedLinear.forward, hydra_peft.FusedLinear._fast_forward

    def counted(self, x, *args, **kwargs):
        before, asked = counts["fast"], what_it_asks(self, args, kwargs)
        result = forward(self, x, *args, **kwargs)
        if counts["fast"] == before:
            counts[asked] += 1
        return result

    def counted_fast(self, *args, **kwargs):
        counts["fast"] += 1
        return fast(self, *args, **kwargs)

    hydra_peft.FusedLinear.forward = counted
    hydra_peft.FusedLinear._fast_forward = counted_fast


def what_it_asks(layer, args, kwargs):
    """Why PEFT's own forward might have to run."""
    if layer.disable_adapters:
        return "disabled"
    if args or kwargs:
        return "adapter_names or other arguments"
    if layer.merged:
        return "merged"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return "no active adapter"
    if any(name in layer.lora_variant for name in names):
        return "variant"
    if any(layer.lora_B[name].bias is not None for name in names):
        return "lora_bias"
    return "other"


def is_of_another_method(item):
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        kind = value if isinstance(value, type) else type(value)
        if issubclass(kind, PeftConfig) and not issubclass(kind, LoraConfig):
            return True
    return False


def pytest_collection_modifyitems(config, items):
    of_lora = [item for item in items if not is_of_another_method(item)]
    kept = of_lora[::EVERY]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


class Cached(defaultdict):
    """Says that every model was fetched before, so that PEFT's tests ask no network for it."""

    def __contains__(self, model_id):
        return True


def pytest_configure(config):
    testing_utils._HUB_MODEL_ACCESSES = Cached(int)
    count_forwards()
    if WAY == "fuse":
        inject = BaseTuner.inject_adapter  # of mixed models too

        def inject_and_fuse(self, *args, **kwargs):
            result = inject(self, *args, **kwargs)
            hydra_peft.fuse(self)
            return result

        BaseTuner.inject_adapter = inject_and_fuse
    elif WAY == "register":
        finish = LoraConfig.__post_init__

        def finish_and_register(self):
            finish(self)
            hydra_peft.register(self)

        LoraConfig.__post_init__ = finish_and_register
    elif WAY == "context":
        config._hydra_layers = hydra_peft.fused_layers()
        config._hydra_layers.__enter__()
    elif WAY != "stock":
        raise ValueError(f"HYDRA_PEFT_WAY must be stock, fuse, register or context, got {WAY!r}")


def pytest_unconfigure(config):
    if WAY == "context":
        config._hydra_layers.__exit__(None, None, None)
    path = os.environ.get("HYDRA_PEFT_COUNTS")
    if path:
        with open(path, "w") as file:
            json.dump(counts, file)
