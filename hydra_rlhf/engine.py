"""Sampling without a loop of transformers around it: fixed buffers, state on the device.

One forward of transformers' own trunk a token, over key and value buffers of a fixed size; every
number that changes from token to token (position, write slot, length, finished, uniform draw) is a
tensor on the device, and the host looks at it only once in a while. So a step is a fixed list of
operations and is recorded: on a GPU as a CUDA graph, once for a batch and a length bucket; on a CPU
by :mod:`hydra_kernels.replay`, once for a batch and a length, where it then runs in one call.
Weights and adapters are read in place: an optimizer step needs no new recording.

A row owns its slots: when its response ends, a waiting prompt takes its place while the other rows
go on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import hydra_kernels.peft
from hydra_kernels.replay import NotReplayable
from hydra_rlhf.decodable import Unsupported, check_supported, waits_for_experts
from hydra_rlhf.decode_state import (
    Prefill,
    State,
    new_state,
    prefill_masks,
    widen,
)
from hydra_rlhf.generated import Entering, Generated, as_rollout, finish
from hydra_rlhf.model import HydraModel, position_ids
from hydra_rlhf.replayed import captured, fingerprint, recorded
from hydra_rlhf.rollout import Engine, Request, Rollout, Sampling, check_sampling, generate
from hydra_rlhf.token_choice import Chosen, choose, uniforms_of, write

_log = logging.getLogger("hydra_rlhf")


class RolloutEngine(Engine):
    """The engine of this package: a row's tokens depend on its own seed alone.

    Args:
        model: Whose actor (or reference) samples.
        batch_size: Rows at a time; more prompts wait for a row to finish. None: all at once.
        check_every: Steps between two looks at which rows have finished.
        bucket: Attention reads a multiple of this many slots; on a GPU one graph is captured for
            each multiple. A replay on a CPU reads what a row has and needs none.
        graph: Capture CUDA graphs; None does so on a GPU, and says once where it cannot be.
        replay: Record the step and replay it on a CPU; None does so where it can be, and says once
            where not.
        keep: Most bytes of buffers that graphs keep between calls; past it :meth:`release` frees
            both, and the next call captures anew. None is a twentieth of the device's memory.
    """

    def __init__(
        self,
        model: HydraModel,
        *,
        batch_size: int | None = None,
        check_every: int = 8,
        bucket: int | None = None,
        graph: bool | None = None,
        replay: bool | None = None,
        keep: int | None = None,
    ):
        counts = {"batch_size": batch_size, "check_every": check_every, "bucket": bucket}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        on_gpu = model.device.type == "cuda"
        self.model = model
        self.batch_size = batch_size
        self.check_every = check_every
        self.bucket = bucket or (256 if on_gpu else 32)
        self.graph = on_gpu and _is_captured(model) if graph is None else graph
        self._keep = _twentieth(model.device) if keep is None else keep
        self._key: tuple | None = None
        self._state: State | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # of memory, for all graphs: one runs at a time, and keeps nothing
        self.replay = model.device.type == "cpu" if replay is None else replay
        self._replays: dict[int, _Step] = {}  # by adapter id
        self._entering = Entering(model, False)
        self._adapter = torch.tensor(-1, device=model.device)
        self._refused = False

    def sample(self, request: Request) -> Rollout:
        """By ``generate`` where this engine cannot run; ``seeds`` and ``keep_prefix`` are not
        obeyed there."""
        assert request.model is self.model
        prompts = request.input_ids, request.attention_mask
        if not self._refused:
            try:
                out = self.generate(
                    *prompts,
                    request.sampling,
                    role=request.role,
                    seeds=request.seeds,
                    keep_prefix=request.keep_prefix,
                )
            except Unsupported as reason:
                self._refused = True
                _log.warning("rollouts run by transformers' generate: %s", str(reason))
            else:
                return as_rollout(out, *prompts, request.with_logprobs)
        return generate(*request[:4], role=request.role, with_logprobs=request.with_logprobs)

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value buffers that are held now."""
        return 0 if self._state is None else self._state.cache.nbytes

    def release(self) -> None:
        """Frees buffers, for a phase that wants their memory; graphs with them past ``keep``.

        A step that is replayed on a CPU stays recorded: it is a few kilobytes.
        """
        if self._state is None:
            return
        if self._replays:
            self._state.release()
        elif not self._graphs or self._state.nbytes > self._keep:
            self._forget()

    def _forget(self) -> None:
        self._key, self._state, self._graphs, self._replays = None, None, {}, {}
        self._pool = None

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        *,
        role: str = "actor",
        seeds: Sequence[int] | None = None,
        values: bool = False,
        keep_prefix: bool = False,
    ) -> Generated:
        """Samples a response to every prompt.

        Args:
            input_ids: (N, P) prompts padded on the left.
            attention_mask: (N, P), nonzero where there is a token.
            sampling: Temperature, filters, stop tokens, lengths.
            role: actor or reference.
            seeds: One a prompt: its tokens then depend on it and on nothing else of the batch.
                None draws from torch's generator.
            values: Also the value head on the states that come by; free where one adapter serves
                both (J-Hydra), and meaningless elsewhere, so an error.
            keep_prefix: Also what enters the first adapted block, so that scoring need not run the
                blocks below it.

        Raises:
            Unsupported: the model keeps its past in another way than as keys and values a layer,
                or what a token sees depends on more than its masks.
            ValueError: ``values`` without a joint adapter, another number of seeds, no prompts, or
                settings that no distribution has.
        """
        model = self.model
        check_sampling(sampling)
        if values and model.role("critic").adapter != model.role(role).adapter:
            raise ValueError("values need one adapter for actor and critic")
        if seeds is not None and len(seeds) != len(input_ids):
            raise ValueError(f"{len(input_ids)} prompts need as many seeds, got {len(seeds)}")
        if input_ids.shape[0] == 0:
            raise ValueError("no prompts")
        check_supported(model.causal_lm, input_ids.shape[1] + sampling.response_length)
        uniforms = uniforms_of(seeds, len(input_ids), sampling.response_length, input_ids.device)
        adapter = model.adapter_id(role)
        self._entering = Entering(model, keep_prefix)
        with model.no_dropout(), self._adapters(adapter), self._entering:
            out = self._run(input_ids, attention_mask, sampling, uniforms, values, adapter)
        prefix = None
        if "prefix" in out:
            # Of prompts as they were given, without what they were widened by.
            given = slice(self._widened(input_ids), None)
            kept = out.pop("prefix")[:, given][:, : input_ids.shape[1] + sampling.response_length]
            prefix = self._entering.prefix(kept)
        return finish(out, sampling, prefix)

    def _adapters(self, adapter: int) -> contextlib.AbstractContextManager:
        if not self.model.adapters:
            return contextlib.nullcontext()
        if not self.graph:
            return hydra_kernels.peft.adapter_ids(self.model.base, adapter)
        # A graph reads the id on the device, so that it serves every role.
        self._adapter.fill_(adapter)
        return hydra_kernels.peft.adapter_ids(self.model.base, self._adapter)

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        uniforms: Tensor,
        values: bool,
        adapter: int,
    ) -> dict[str, Tensor]:
        N, T = len(input_ids), sampling.response_length
        B = min(N, self.batch_size or N)
        input_ids, attention_mask = widen(input_ids, attention_mask, self._widened(input_ids))
        P = input_ids.shape[1]
        inputs = (input_ids, attention_mask, sampling, uniforms, values)
        owner: list[int | None] = list(range(B))  # the prompt that each row answers
        waiting = deque(range(B, N))
        state = self._fill(None, None, list(range(B)), *inputs)
        out = {
            name: buffer.new_zeros(N, *buffer.shape[1:])
            for name, buffer in state.collected().items()
        }
        step = self._recorded(state, sampling, adapter)
        drawn = [1] * B  # tokens of each row's response, as far as the host knows without asking
        since = 0
        while True:
            busy = [count for count, prompt in zip(drawn, owner, strict=True) if prompt is not None]
            if since >= self.check_every or all(count >= T for count in busy):
                since = 0
                finished = state.finished.tolist()  # the one wait for the device
                rows = [row for row in range(B) if finished[row] and owner[row] is not None]
                if rows and state.prefix is not None:
                    self._feed(state, step)
                for name, buffer in state.collected().items():
                    out[name][[owner[row] for row in rows]] = buffer[rows]
                for row in rows:
                    owner[row] = None
                rows = rows[: len(waiting)]
                if rows:
                    prompts = [waiting.popleft() for _ in rows]
                    self._fill(state, rows, prompts, *inputs)
                    for row, prompt in zip(rows, prompts, strict=True):
                        owner[row], drawn[row] = prompt, 1
                if all(prompt is None for prompt in owner):
                    return out
                continue
            seen = P + max(min(count, T - 1) for count in busy)  # the last token's slot included
            if step is None:
                most = state.mask.shape[1]
                self._step(min(-(-seen // self.bucket) * self.bucket, most), sampling)
            else:
                step()
            drawn = [count + 1 for count in drawn]
            since += 1

    def _widened(self, input_ids: Tensor) -> int:
        """Columns more than prompts have: to a bucket where batches of all widths share graphs."""
        return -input_ids.shape[1] % self.bucket if self.graph else 0

    def _fill(
        self,
        state: State | None,
        rows: list[int] | None,
        prompts: list[int],
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        uniforms: Tensor,
        values: bool,
    ) -> State:
        """Prefills ``prompts`` into ``rows``, at the start all of them, and draws a first token."""
        device = input_ids.device
        picked = torch.tensor(prompts, device=device)
        ids, mask = input_ids[picked], attention_mask[picked]
        B, P = ids.shape
        if state is None:
            state = self._new_state(B, P, sampling, values, device)
        row = torch.arange(B, device=device) if rows is None else torch.tensor(rows, device=device)
        prefill = Prefill(state.cache, row)
        self._entering.state = None
        masks = prefill_masks(mask, self._dtype, self._window)
        hidden = self._trunk(ids, masks, position_ids(mask), prefill)
        layers = self.model.config.get_text_config().num_hidden_layers
        if prefill.count != layers:
            raise Unsupported(
                f"{type(self.model.trunk).__name__} caches {prefill.count} of {layers} layers"
            )
        # Numbers by index_fill_: for [row] = 0 torch 2.11 copies them from the host, and waits.
        state.cache.slot.index_fill_(0, row, P)
        lowest = torch.finfo(self._dtype).min
        state.mask.index_fill_(0, row, lowest)
        state.mask[row, :P] = torch.where(mask != 0, 0.0, lowest).to(self._dtype)
        state.position[row] = mask.long().sum(-1, keepdim=True)
        state.column.index_fill_(0, row, 0)
        state.finished.index_fill_(0, row, False)
        state.uniforms[row] = uniforms[picked]
        for buffer in state.collected().values():
            buffer.index_fill_(0, row, 0)
        if self._entering.on:
            entered = self._entering.taken()  # (B, P, D)
            if state.prefix is None:
                held = len(state.finished), state.mask.shape[1], entered.shape[-1]
                state.prefix = entered.new_zeros(held)
            state.prefix[row, :P] = entered
            self._entering.state = state
        state.mask[:, P].index_fill_(0, row, 0.0)  # the first response token will sit there
        part = state.rows(row)
        self._append(part, hidden[:, -1], sampling)
        state.put_rows(row, part)
        return state

    def _new_state(
        self, B: int, P: int, sampling: Sampling, values: bool, device: torch.device
    ) -> State:
        """Buffers of this size, those of the last call where they fit.

        On a CPU narrower prompts fit into buffers of wider ones: a step is recorded for the slots
        that there are, and masks hide those that a batch does not have.
        """
        T = sampling.response_length
        # CUDA's attention copies masks, once a layer, whose rows do not begin at 16 bytes.
        slots = -(-(P + T) // 8) * 8 if self.graph else P + T
        window = self._window is not None and self._window < slots
        width = P if self.graph else None
        settings = sampling, values, self._entering.on, self._dtype
        key = (B, width, T, settings, fingerprint(self.model))
        if self._key == key and self._state is not None and slots <= self._state.mask.shape[1]:
            self._state.restore()
            return self._state
        self._forget()
        self._key = key
        self._state = new_state(
            B, slots, T, device, window=window, values=values, dtype=self._dtype
        )
        return self._state

    def _recorded(self, state: State, sampling: Sampling, adapter: int) -> _Step | None:
        """The step as a replay; None where it is not to be, or cannot be."""
        if not self.replay:
            return None
        step = self._replays.get(adapter)
        if step is None:
            try:
                step = self._replays[adapter] = _Step(self, state, sampling)
            except NotReplayable as reason:
                self.replay = False
                _log.warning("decoding runs one PyTorch operation after another: %s", str(reason))
                return None
        else:
            step.replay.refresh()
        return step

    def _step(self, seen: int, sampling: Sampling) -> None:
        """One token for every row that has not finished; attention reads ``seen`` slots."""
        state = self._state
        assert state is not None
        if not self.graph:
            self._token(state, seen, sampling)
            return
        if seen not in self._graphs:
            self._graphs[seen] = self._capture(state, seen, sampling)
        self._graphs[seen].replay()

    def _capture(self, state: State, seen: int, sampling: Sampling) -> torch.cuda.CUDAGraph:
        """The step as a graph. Warming up runs it, so the state is put back after.

        Keys, values and activations that it has written need not be: the same tokens come again.
        """
        kept = {name: buffer.clone() for name, buffer in state.changing().items()}
        slot = state.cache.slot.clone()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        step = functools.partial(self._token, state, seen, sampling)
        graph = captured(step, self._pool, state.token.device)
        for name, buffer in state.changing().items():
            buffer.copy_(kept[name])
        state.cache.slot.copy_(slot)
        return graph

    def _token(self, state: State, seen: int, sampling: Sampling) -> None:
        self._see(state, seen)
        hidden = self._next_hidden(state, seen)  # (B, D)
        self._advance(state)
        self._append(state, hidden, sampling)

    def _feed(self, state: State, step: _Step | None) -> None:
        """Runs the rows' last tokens, for the activations of those that ended with the last step.

        For all others it is what has been run or will be run again.
        """
        seen = state.mask.shape[1]
        self._see(state, seen)
        if step is None:
            self._next_hidden(state, seen)
        else:
            step.replay()

    def _next_hidden(self, state: State, seen: int) -> Tensor:
        """The last hidden state (B, D) of the rows' last tokens, whose keys and values it keeps."""
        state.cache.seen = seen
        full = state.mask[:, None, None, :seen]
        near = full if state.near is None else state.near[:, None, None, :seen]
        return self._trunk(state.token, (full, near), state.position, state.cache)[:, -1]

    def _see(self, state: State, seen: int) -> None:
        """Puts what layers with a sliding window see of the first ``seen`` slots."""
        if state.near is None:
            return
        window = self._window
        assert window is not None
        slots = torch.arange(seen, device=state.near.device)
        out_of_sight = slots <= state.cache.slot[:, None] - window  # (B, seen)
        lowest = torch.finfo(state.near.dtype).min
        state.near[:, :seen] = state.mask[:, :seen].masked_fill(out_of_sight, lowest)

    def _advance(self, state: State) -> None:
        """Moves the rows that go on to their next slot, which attention then sees."""
        going = (~state.finished).long()
        state.cache.slot.add_(going)
        state.position.add_(going[:, None])
        # Not by [...] = 0.0, for which torch 2.11 copies the number from the host.
        state.mask.scatter_(1, state.cache.slot[:, None], 0.0)

    def _append(self, state: State, hidden: Tensor, sampling: Sampling) -> None:
        """Draws the next token of every row from its last hidden state (B, D)."""
        chosen = choose(self.model.lm_head.logits(hidden).float(), state, sampling)
        self._write(state, hidden, chosen, sampling)

    def _write(self, state: State, hidden: Tensor, chosen: Chosen, sampling: Sampling) -> None:
        values = None if state.values is None else self.model.value_head(hidden.float())
        write(state, chosen, values, sampling)

    def _trunk(self, ids: Tensor, mask: Any, positions: Tensor, cache: Cache) -> Tensor:
        return self.model.trunk(
            input_ids=ids,
            attention_mask=self._by_kind(mask),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _by_kind(self, masks: tuple[Tensor, Tensor]) -> Tensor | dict[str, Tensor]:
        """(full, sliding) masks in the form that the family takes."""
        config = self.model.config.get_text_config()
        full, sliding = masks
        kinds = getattr(config, "layer_types", None)
        if "sliding_attention" in (kinds or ()):
            return {"full_attention": full, "sliding_attention": sliding}
        # Layers that are all of one kind say so, whatever window is configured.
        return full if kinds or self._window is None else sliding

    @property
    def _window(self) -> int | None:
        config = self.model.config.get_text_config()
        if getattr(config, "use_sliding_window", True) is False:
            return None
        return getattr(config, "sliding_window", None)

    @property
    def _dtype(self) -> torch.dtype:
        """Of attention: the lowest number of a wider one would be -inf there, rows of it NaN."""
        device = self.model.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.model.causal_lm.dtype


class _Step:
    """A token for every row of a state, its forward pass and draw replayed on the CPU."""

    def __init__(self, engine: RolloutEngine, state: State, sampling: Sampling):
        self.engine, self.state, self.sampling = engine, state, sampling
        self.seen = state.mask.shape[1]
        engine._see(state, self.seen)
        self.replay = recorded(engine.model, self._forward, engine._dtype)

    def _forward(self) -> tuple[Tensor, ...]:
        hidden = self.engine._next_hidden(self.state, self.seen)
        logits = self.engine.model.lm_head.logits(hidden).float()
        return hidden.float(), logits, *choose(logits, self.state, self.sampling)

    def __call__(self) -> None:
        state = self.state
        self.engine._see(state, self.seen)
        self.replay()
        hidden, _, *chosen = self.replay.outputs
        self.engine._advance(state)
        self.engine._write(state, hidden, tuple(chosen), self.sampling)  # type: ignore[arg-type]


def _is_captured(model: HydraModel) -> bool:
    capability = torch.cuda.get_device_capability(model.device)
    if reason := waits_for_experts(model.causal_lm, capability):
        _log.warning("decoding runs without CUDA graphs: %s", reason)
    return not reason


def _twentieth(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory // 20
