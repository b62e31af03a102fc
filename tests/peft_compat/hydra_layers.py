"""A pytest plugin that puts our layers into PEFT's own tests: ``-p hydra_layers``.

HYDRA_PEFT_WAY names the way in: "fuse", "register", "context", or "stock" for none. At the end of
the session the forwards of our layers are counted into the folder HYDRA_PEFT_COUNTS.
"""

import json
import os
from collections import Counter

from peft import LoraConfig
from peft.tuners.lora import LoraModel

import hydra_kernels.peft as hydra_peft

WAY = os.environ.get("HYDRA_PEFT_WAY", "stock")
counts = Counter()


def count(name):
    method = getattr(hydra_peft.FusedLinear, name)

    def counted(self, *args, **kwargs):
        counts[name] += 1
        return method(self, *args, **kwargs)

    setattr(hydra_peft.FusedLinear, name, counted)


def pytest_configure(config):
    count("forward")
    count("_fast_forward")
    if WAY == "fuse":
        inject = LoraModel.inject_adapter

        def inject_and_fuse(self, *args, **kwargs):
            result = inject(self, *args, **kwargs)
            hydra_peft.fuse(self)
            return result

        LoraModel.inject_adapter = inject_and_fuse
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
    folder = os.environ.get("HYDRA_PEFT_COUNTS")
    if folder and counts:
        with open(os.path.join(folder, f"{os.getpid()}.json"), "w") as file:
            json.dump(counts, file)
