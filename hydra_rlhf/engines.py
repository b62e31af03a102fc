"""The engines that sample responses, by the names of ``rollout_engine``, and how to add yours.

An engine is a :class:`hydra_rlhf.rollout.Engine`. With ``--rollout_engine my_module:make_engine``
(a module of the working directory, or an installed one) ``make_engine(model, config)`` is called
once for each model that samples, with the :class:`hydra_rlhf.model.HydraModel` and the
:class:`hydra_rlhf.config.PPOConfig`, and returns yours.
"""

from __future__ import annotations

from collections.abc import Callable

from hydra_rlhf.config import ROLLOUT_ENGINES, PPOConfig
from hydra_rlhf.continuous_rollout import ContinuousEngine
from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.processes import Processes
from hydra_rlhf.rewards import load_named
from hydra_rlhf.rollout import Engine, Request, Rollout, Sampling, generate
from hydra_rlhf.vllm_rollout import VLLMEngine

Factory = Callable[[HydraModel, PPOConfig], Engine]


class GenerateEngine(Engine):
    """Samples by transformers' ``generate``, from torch's generator.

    ``seeds`` and ``keep_prefix`` are not obeyed.

    Args:
        synced_gpus: As transformers': go on until every process is done.
    """

    def __init__(self, *, synced_gpus: bool = False):
        self.synced_gpus = synced_gpus

    def sample(self, request: Request) -> Rollout:
        return generate(
            *request[:4],
            role=request.role,
            with_logprobs=request.with_logprobs,
            synced_gpus=self.synced_gpus,
        )


class Engines:
    """The engines of one run, made when a model first samples.

    Args:
        config: Whose ``rollout_engine`` names them.
        sampling: Of the run.
        processes: Of the run.

    Raises:
        UserError: there is no such engine, what it needs is not installed, or it cannot run in
            these processes.
    """

    def __init__(self, config: PPOConfig, sampling: Sampling, processes: Processes):
        self.config = config
        # Tokens that need a part of the model from each process: all have to make as many.
        self.common = processes.sharding is not None and not config.gather_for_generation
        name = config.rollout_engine
        if self.common and name not in ("hydra", "transformers"):
            raise UserError(f"rollout_engine {name!r} needs gather_for_generation under FSDP")
        if name == "vllm" and processes.count > 1:
            raise UserError("rollout_engine 'vllm' runs in one process")
        self._made: dict[HydraModel, Engine] = {}
        self._one: Engine | None = None  # that serves every model
        self._factory: Factory | None = None
        if name == "vllm":
            self._one = VLLMEngine(config.sft_model_path)
        elif name == "continuous":
            self._one = ContinuousEngine()
        elif name == "transformers":
            self._one = GenerateEngine(synced_gpus=self.common)
        elif name != "hydra":
            self._factory = load_named(name, "rollout_engine")
        self._settings: dict = {}
        if processes.sharding is not None:
            # Gathered weights lie elsewhere each time.
            self._settings.update(graph=False, replay=False)
        if self.common:
            self._settings["check_every"] = sampling.response_length  # none stops before

    def of(self, model: HydraModel) -> Engine:
        """The engine that samples from a model."""
        if self._one is not None:
            return self._one
        if model not in self._made:
            if self._factory is None:
                self._made[model] = RolloutEngine(model, **self._settings)
            else:
                made = self._factory(model, self.config)
                if not isinstance(made, Engine):
                    raise UserError(
                        f"rollout_engine {self.config.rollout_engine!r} made a "
                        f"{type(made).__name__}, not a hydra_rlhf.rollout.Engine"
                    )
                self._made[model] = made
        return self._made[model]


__all__ = ["ROLLOUT_ENGINES", "Engines", "Factory", "GenerateEngine"]
