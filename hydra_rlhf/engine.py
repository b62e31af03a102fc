"""Sampling without a loop of transformers around it: fixed buffers, state on the device.

One forward of transformers' own trunk a token, over key and value buffers of a fixed size; every
number that changes from token to token (position, write slot, length, finished, uniform draw) is a
tensor on the device, and the host looks at it only once in a while. So a step is a fixed list of
launches: on a GPU it is captured as a CUDA graph, once for a batch and a length bucket, and
replayed. Weights and adapters are read in place: an optimizer step, or another role, needs no new
capture.

A row owns its slots: when its response ends, a waiting prompt takes its place while the other rows
go on.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

import hydra_kernels.peft
from hydra_rlhf.model import HydraModel, position_ids
from hydra_rlhf.rollout import Rollout, Sampling, response_lengths
from hydra_rlhf.rollout import generate as generate_by_transformers

_log = logging.getLogger("hydra_rlhf")


class Unsupported(Exception):
    """The engine cannot run this model; the message says why."""


class Generated(NamedTuple):
    """What :meth:`RolloutEngine.generate` returns, one row a prompt, T columns.

    Attributes:
        tokens: (N, T) int64; the pad id right of a response's end.
        lengths: (N,) int64, tokens of each response, its stop token included.
        ended: (N,) bool, True where a stop token came before the length ran out.
        logprobs: (N, T) float32 in nats under the policy at this temperature, before any filter; 0
            right of the end.
        sampled_logprobs: (N, T) as logprobs, under the filtered distribution that was sampled from.
        values: (N, T) float32, the value head at the state before each token; None unless asked.
    """

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor
    values: Tensor | None


class _Prefill(Cache):
    """Hands every layer its own keys and values back and remembers them."""

    def __init__(self) -> None:
        self.layers: list = []  # transformers looks through it for kinds of layers
        self.kept: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx != len(self.kept):
            raise Unsupported(f"layer {layer_idx} caches out of turn")
        self.kept.append((key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0, *args) -> int:
        return 0


class _Buffers(Cache):
    """Keys and values (B, heads, L, head size) of every layer, written at each row's own slot."""

    def __init__(self, like: list[tuple[Tensor, Tensor]], batch: int, length: int):
        self.layers: list = []
        self.pairs = [
            tuple(t.new_zeros((batch, t.shape[1], length, t.shape[3])) for t in pair)
            for pair in like
        ]
        self.rows = torch.arange(batch, device=like[0][0].device)
        self.slot = torch.zeros_like(self.rows)  # (B,) where the next token's keys go
        self.seen = length  # how many slots attention reads

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for buffer, new in zip(self.pairs[layer_idx], (key_states, value_states), strict=True):
            buffer[self.rows, :, self.slot] = new[:, :, 0]
        keys, values = self.pairs[layer_idx]
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def get_seq_length(self, layer_idx: int = 0, *args) -> int:
        return 0  # positions and masks are passed in, nothing is derived from it

    def put(self, rows: Tensor, prefilled: list[tuple[Tensor, Tensor]]) -> None:
        for buffers, new in zip(self.pairs, prefilled, strict=True):
            for buffer, part in zip(buffers, new, strict=True):
                buffer[rows, :, : part.shape[2]] = part

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in self.pairs for t in pair)


@dataclass
class _State:
    """What a step reads and writes. B rows, T response tokens, L = P + T slots."""

    cache: _Buffers
    mask: Tensor  # (B, L) added to attention scores: 0 or the dtype's lowest
    token: Tensor  # (B, 1) the last token, whose keys are not written yet
    position: Tensor  # (B, 1)
    column: Tensor  # (B, 1) of the response, where the next token goes
    finished: Tensor  # (B,)
    uniforms: Tensor  # (B, T)
    tokens: Tensor  # (B, T)
    logprobs: Tensor  # (B, T)
    sampled_logprobs: Tensor  # (B, T)
    values: Tensor | None  # (B, T)

    def outputs(self) -> dict[str, Tensor]:
        named = {n: getattr(self, n) for n in ("tokens", "logprobs", "sampled_logprobs", "values")}
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    def changing(self) -> dict[str, Tensor]:
        """Everything that a token changes besides keys and values."""
        names = ("mask", "token", "position", "column", "finished", "uniforms")
        return {**{name: getattr(self, name) for name in names}, **self.outputs()}

    def rows(self, row: Tensor) -> _State:
        """A copy of some rows, to choose their next token apart from the others."""
        some: dict[str, Any] = {name: buffer[row] for name, buffer in self.changing().items()}
        return replace(self, **some)

    def put_rows(self, row: Tensor, part: _State) -> None:
        for name, buffer in self.changing().items():
            buffer[row] = getattr(part, name)


class RolloutEngine:
    """Generates under a role's adapter; drop-in for :func:`hydra_rlhf.rollout.generate`.

    Args:
        model: Whose actor (or reference) samples.
        batch_size: Rows at a time; more prompts wait for a row to finish. None: all at once.
        check_every: Steps between two looks at which rows have finished.
        bucket: Attention reads a multiple of this many slots; on a GPU one graph is captured for
            each multiple.
        graph: Capture CUDA graphs; None does so on a GPU.
    """

    def __init__(
        self,
        model: HydraModel,
        *,
        batch_size: int | None = None,
        check_every: int = 8,
        bucket: int | None = None,
        graph: bool | None = None,
    ):
        on_gpu = model.device.type == "cuda"
        self.model = model
        self.batch_size = batch_size
        self.check_every = check_every
        self.bucket = bucket or (256 if on_gpu else 32)
        self.graph = on_gpu if graph is None else graph
        self._key: tuple | None = None
        self._state: _State | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._adapter = torch.tensor(-1, device=model.device)
        self._refused = False

    def __call__(
        self,
        model: HydraModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        *,
        role: str = "actor",
        with_logprobs: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Rollout:
        """As :func:`hydra_rlhf.rollout.generate`, and by it where the engine cannot run.

        There, ``seeds`` are not obeyed.
        """
        assert model is self.model
        if not self._refused:
            try:
                out = self.generate(input_ids, attention_mask, sampling, role=role, seeds=seeds)
            except Unsupported as reason:
                self._refused = True
                _log.warning("rollouts run by transformers' generate: %s", reason)
            else:
                return _as_rollout(out, input_ids, attention_mask, with_logprobs)
        return generate_by_transformers(
            model, input_ids, attention_mask, sampling, role=role, with_logprobs=with_logprobs
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value buffers that are held now."""
        return 0 if self._state is None else self._state.cache.nbytes

    def release(self) -> None:
        """Frees buffers and graphs, for a phase that wants their memory."""
        self._key, self._state, self._graphs = None, None, {}

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

        Raises:
            Unsupported: the model keeps its past in another way than as keys and values a layer.
            ValueError: ``values`` without a joint adapter, or another number of seeds.
        """
        model = self.model
        if values and model.role("critic").adapter != model.role(role).adapter:
            raise ValueError("values need one adapter for actor and critic")
        if seeds is not None and len(seeds) != len(input_ids):
            raise ValueError(f"{len(input_ids)} prompts need as many seeds, got {len(seeds)}")
        if input_ids.shape[0] == 0:
            raise ValueError("no prompts")
        uniforms = _uniforms(seeds, len(input_ids), sampling.response_length, input_ids.device)
        with model.no_dropout(), self._adapters(model.adapter_id(role)):
            return self._run(input_ids, attention_mask, sampling, uniforms, values)

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
    ) -> Generated:
        N, T = len(input_ids), sampling.response_length
        B = min(N, self.batch_size or N)
        # On a GPU prompts are widened to a bucket, so that batches of several widths share graphs.
        if self.graph:
            input_ids, attention_mask = _widen(input_ids, attention_mask, self.bucket)
        P = input_ids.shape[1]
        inputs = (input_ids, attention_mask, sampling, uniforms, values)
        owner: list[int | None] = list(range(B))  # the prompt that each row answers
        waiting = deque(range(B, N))
        state = self._fill(None, None, list(range(B)), *inputs)
        out = {name: buffer.new_zeros(N, T) for name, buffer in state.outputs().items()}
        drawn = [1] * B  # tokens of each row's response, as far as the host knows without asking
        since = 0
        while True:
            busy = [count for count, prompt in zip(drawn, owner, strict=True) if prompt is not None]
            if since >= self.check_every or all(count >= T for count in busy):
                since = 0
                finished = state.finished.tolist()  # the one wait for the device
                rows = [row for row in range(B) if finished[row] and owner[row] is not None]
                for name, buffer in state.outputs().items():
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
                    return _finish(out, sampling)
                continue
            seen = P + max(min(count, T - 1) for count in busy)  # the last token's slot included
            self._step(min(-(-seen // self.bucket) * self.bucket, P + T), sampling)
            drawn = [count + 1 for count in drawn]
            since += 1

    def _fill(
        self,
        state: _State | None,
        rows: list[int] | None,
        prompts: list[int],
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        uniforms: Tensor,
        values: bool,
    ) -> _State:
        """Prefills ``prompts`` into ``rows``, at the start all of them, and draws a first token."""
        device = input_ids.device
        picked = torch.tensor(prompts, device=device)
        ids, mask = input_ids[picked], attention_mask[picked]
        B, P = ids.shape
        prefill = _Prefill()
        masks = _prefill_masks(mask, self._dtype, self._window)
        hidden = self._trunk(ids, masks, position_ids(mask), prefill)
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(prefill.kept) != layers:
            raise Unsupported(
                f"{type(self.model.trunk).__name__} caches {len(prefill.kept)} of {layers} layers"
            )
        if state is None:
            state = self._new_state(prefill.kept, B, P, sampling, values)
        row = torch.arange(B, device=device) if rows is None else torch.tensor(rows, device=device)
        state.cache.put(row, prefill.kept)
        state.cache.slot[row] = P
        lowest = torch.finfo(self._dtype).min
        state.mask[row] = lowest
        state.mask[row, :P] = torch.where(mask != 0, 0.0, lowest).to(self._dtype)
        state.position[row] = mask.long().sum(-1, keepdim=True)
        state.column[row] = 0
        state.finished[row] = False
        state.uniforms[row] = uniforms[picked]
        for buffer in state.outputs().values():
            buffer[row] = 0
        part = state.rows(row)
        self._choose(part, hidden[:, -1], sampling)
        state.put_rows(row, part)
        return state

    def _new_state(self, like: Any, B: int, P: int, sampling: Sampling, values: bool) -> _State:
        """Buffers of this size, those of the last call where they fit."""
        T = sampling.response_length
        key = (B, P, T, sampling, values, self._dtype)
        if self._key == key and self._state is not None:
            return self._state
        self.release()
        device = like[0][0].device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._key = key
        self._state = _State(
            cache=_Buffers(like, B, P + T),
            mask=zeros(B, P + T, dtype=self._dtype),
            token=zeros(B, 1, dtype=torch.long),
            position=zeros(B, 1, dtype=torch.long),
            column=zeros(B, 1, dtype=torch.long),
            finished=zeros(B, dtype=torch.bool),
            uniforms=zeros(B, T, dtype=torch.float32),
            tokens=zeros(B, T, dtype=torch.long),
            logprobs=zeros(B, T, dtype=torch.float32),
            sampled_logprobs=zeros(B, T, dtype=torch.float32),
            values=zeros(B, T, dtype=torch.float32) if values else None,
        )
        return self._state

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

    def _capture(self, state: _State, seen: int, sampling: Sampling) -> torch.cuda.CUDAGraph:
        """The step as a graph. Warming up runs it, so the state is put back after."""
        kept = {name: buffer.clone() for name, buffer in state.changing().items()}
        slot = state.cache.slot.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._token(state, seen, sampling)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._token(state, seen, sampling)
        for name, buffer in state.changing().items():
            buffer.copy_(kept[name])
        state.cache.slot.copy_(slot)
        return graph

    def _token(self, state: _State, seen: int, sampling: Sampling) -> None:
        cache = state.cache
        cache.seen = seen
        state.mask[cache.rows, cache.slot] = 0.0
        hidden = self._trunk(
            state.token, self._step_mask(state, seen), state.position, cache
        )  # (B, 1, D)
        going = (~state.finished).long()
        cache.slot.add_(going)
        state.position.add_(going[:, None])
        self._choose(state, hidden[:, -1], sampling)

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
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            return {"full_attention": full, "sliding_attention": sliding}
        return full if self._window is None else sliding

    @property
    def _window(self) -> int | None:
        config = self.model.config.get_text_config()
        if getattr(config, "use_sliding_window", True) is False:
            return None
        return getattr(config, "sliding_window", None)

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.causal_lm.dtype

    def _step_mask(self, state: _State, seen: int) -> tuple[Tensor, Tensor]:
        full = state.mask[:, None, None, :seen]
        window = self._window
        if window is None or window >= state.mask.shape[1]:
            return full, full
        slots = torch.arange(seen, device=full.device)
        out_of_sight = slots <= state.cache.slot[:, None] - window  # (B, seen)
        lowest = torch.finfo(full.dtype).min
        return full, full.masked_fill(out_of_sight[:, None, None], lowest)

    def _choose(self, state: _State, hidden: Tensor, sampling: Sampling) -> None:
        """Draws the next token of every row from its last hidden state (B, D)."""
        logits = self.model.lm_head.logits(hidden).float()  # (B, V)
        logprobs = torch.log_softmax(logits / sampling.temperature, dim=-1)
        filtered = _filter(logprobs, state.column, sampling)
        if sampling.do_sample:
            token = _draw(filtered, state.uniforms.gather(1, state.column))
        else:
            token = filtered.argmax(-1, keepdim=True)
        going = ~state.finished[:, None]  # (B, 1)
        token = torch.where(going, token, sampling.pad_id)
        _write(state.tokens, state.column, token, going)
        _write(state.logprobs, state.column, logprobs.gather(1, token), going)
        _write(state.sampled_logprobs, state.column, filtered.gather(1, token), going)
        if state.values is not None:
            values = self.model.value_head(hidden.float())
            _write(state.values, state.column, values, going)
        last = state.column == state.tokens.shape[1] - 1
        stop = torch.zeros_like(going)
        for stop_id in sampling.stop_ids:
            stop |= token == stop_id
        state.finished.logical_or_((last | stop).squeeze(1))
        state.column.add_((going & ~last).long())
        state.token.copy_(token)


def _finish(out: dict[str, Tensor], sampling: Sampling) -> Generated:
    counted, ended = response_lengths(out["tokens"], sampling.stop_ids)
    return Generated(
        tokens=out["tokens"].masked_fill(~counted, sampling.pad_id),
        lengths=counted.sum(-1),
        ended=ended,
        logprobs=torch.where(counted, out["logprobs"], 0.0),
        sampled_logprobs=torch.where(counted, out["sampled_logprobs"], 0.0),
        values=torch.where(counted, out["values"], 0.0) if "values" in out else None,
    )


def _as_rollout(
    out: Generated, input_ids: Tensor, attention_mask: Tensor, with_logprobs: bool
) -> Rollout:
    """As wide as the longest response."""
    width = int(out.lengths.max())
    mask = torch.arange(width, device=out.lengths.device) < out.lengths[:, None]
    return Rollout(
        query_responses=torch.cat([input_ids, out.tokens[:, :width]], dim=1),
        attention_mask=torch.cat([attention_mask, mask.to(attention_mask.dtype)], dim=1),
        response_mask=mask,
        ended=out.ended,
        logprobs=out.logprobs[:, :width] if with_logprobs else None,
    )


def _uniforms(seeds: Sequence[int] | None, N: int, T: int, device: torch.device) -> Tensor:
    """(N, T) in [0, 1): all that sampling draws, so that a step draws nothing."""
    if seeds is None:
        return torch.rand(N, T, device=device)
    rows = [torch.rand(T, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(device)


def _widen(ids: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    missing = -ids.shape[1] % multiple
    return tuple(torch.nn.functional.pad(t, (missing, 0)) for t in (ids, mask))  # type: ignore


def _prefill_masks(mask: Tensor, dtype: torch.dtype, window: int | None) -> tuple[Tensor, Tensor]:
    """(B, 1, P, P) to add to attention scores: for full and for sliding layers."""
    P = mask.shape[1]
    slots = torch.arange(P, device=mask.device)
    lowest = torch.finfo(dtype).min
    seen = (slots <= slots[:, None]) & (mask != 0)[:, None, None]
    full = torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, lowest)
    if window is None or window >= P:
        return full, full
    return full, full.masked_fill(slots <= slots[:, None] - window, lowest)


def _filter(logprobs: Tensor, column: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) log-probabilities of what may be sampled, normalised; -inf for the rest."""
    scores = logprobs
    if sampling.min_response_length > 0:
        early = column < sampling.min_response_length  # (B, 1)
        scores = scores.clone()
        for stop_id in sampling.stop_ids:
            stop = scores[:, stop_id : stop_id + 1]
            stop.copy_(torch.where(early, -torch.inf, stop))
    if 0 < sampling.top_k < scores.shape[1]:
        worst = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < worst, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = torch.softmax(scores, dim=-1).sort(dim=-1, descending=True)
        # A token goes when those before it already hold top_p: the likeliest always stays.
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    if sampling.min_p > 0.0:
        least = scores.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log().item()
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores if scores is logprobs else torch.log_softmax(scores, dim=-1)


def _draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """(B, 1) tokens by inversion: the first whose cumulative probability exceeds the uniform."""
    cumulative = logprobs.exp().cumsum(-1)  # (B, V)
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that a token of probability 0 is never met.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)


def _write(buffer: Tensor, column: Tensor, value: Tensor, going: Tensor) -> None:
    buffer.scatter_(1, column, torch.where(going, value, buffer.gather(1, column)))
