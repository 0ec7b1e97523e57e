"""Training speed and memory: tokens per second, MFU, memory, packing fill, and who waits for whom.

Model FLOPs of one step, forward and backward (Kaplan et al. 2020, arXiv:2001.08361, with attention as in
PaLM, arXiv:2204.02311, halved because causal attention needs only half of its products):

    tokens * (4 * F + 6 * T)  +  6 * layers * heads * head_dim * sum of squared document lengths

where T counts the trained matrix parameters and F the frozen ones, which need no weight gradient: a LoRA
step costs about 4N, not 6N, FLOPs per token. Embedding look-ups cost nothing; the LM head counts as a
matrix even when its weight is tied to the embedding. Norms and biases are left out. Expert layers are
counted by the share of experts a token visits.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from barqtrain_hf.runtime import peak_flops
from barqtrain_hf.timeline import Timeline


def flops_per_token(model: nn.Module) -> float:
    """FLOPs per token outside attention, forward and backward, from which weights are trained."""
    config = model.config  # type: ignore[union-attr]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding_weights = {id(p) for p in embedding.parameters()}
    head_weights = {id(p) for p in head.parameters()} if head is not None else set()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    visited = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    flops = 0.0
    for name, parameter in model.named_parameters():
        is_lookup = id(parameter) in embedding_weights and id(parameter) not in head_weights
        # PEFT keeps an unused original beside a module it trains whole.
        if parameter.dim() < 2 or is_lookup or ".original_module." in name:
            continue
        share = visited if ".experts." in name else 1.0
        flops += share * parameter.numel() * (6.0 if parameter.requires_grad else 4.0)
    return flops


def attention_flops_per_pair(model: nn.Module) -> float:
    """FLOPs of causal attention, forward and backward, per squared token of a document."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * float(config.num_hidden_layers * heads * head_dim)


class ThroughputMeter:
    """Counts what a model in training is fed and turns it into log entries.

    Nothing is read back from the device until `logs` is called.

    Args:
        model: the model as trained (PEFT included), for its FLOPs.
        device: where it trains.
        world_size: number of processes; each is taken to see as many tokens as this one.
        packing_fill: share of the packed rows' capacity that holds tokens, or None.

    Attributes:
        timeline: where pauses, arrivals of batches and the ends of steps are marked.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, world_size: int, packing_fill: float | None
    ) -> None:
        self._device = device
        self._world_size = world_size
        self._packing_fill = packing_fill
        self._flops_per_token = self._flops_per_pair = 0.0
        self._peak = None
        if device.type == "cuda":
            self._peak = peak_flops(device.index or 0)
            if self._peak is not None and _is_transformer(model):
                self._flops_per_token = flops_per_token(model)
                self._flops_per_pair = attention_flops_per_pair(model)
            torch.cuda.reset_peak_memory_stats(device)
        self._reset()
        self.timeline = Timeline(device)

    def _reset(self) -> None:
        self._tokens: torch.Tensor | int = 0  # without padding
        self._pairs: torch.Tensor | int = 0

    def add(self, inputs: dict[str, Any]) -> None:
        """Counts one micro-batch; queues a few tiny kernels at most and never waits for the device."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor):
            return
        mask, offsets = inputs.get("attention_mask"), inputs.get("cu_seq_lens_q")
        if isinstance(offsets, torch.Tensor):
            lengths = offsets.diff().to(torch.int64)
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            lengths = mask.sum(-1)
        else:
            lengths = torch.full(ids.shape[:1], ids.shape[-1], device=ids.device)
        lengths = lengths.to(self._device)  # where layers are on several, inputs may be elsewhere
        self._tokens = self._tokens + lengths.sum()
        self._pairs = self._pairs + lengths.square().sum()

    def logs(self) -> dict[str, float]:
        """Entries since the last call; waits for the device once."""
        tokens, pairs = float(self._tokens), float(self._pairs)
        if tokens == 0:
            return {}
        span = self.timeline.read()
        logs = {"tokens_per_second": self._world_size * tokens / span.seconds}
        if self._device.type == "cuda":
            logs["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            logs["reserved_memory_gib"] = torch.cuda.max_memory_reserved(self._device) / 2**30
        else:
            logs["peak_memory_gib"] = _peak_resident_gib()
        if self._packing_fill is not None:
            logs["packing_fill"] = self._packing_fill
        if self._peak is not None and self._flops_per_token:
            flops = self._flops_per_token * tokens + self._flops_per_pair * pairs
            logs["mfu"] = flops / span.seconds / self._peak
        if self._device.type in ("cpu", "cuda"):  # on others the host's clock says little
            logs["data_wait_share"] = span.data_wait
        if span.host_bound is not None:
            logs["host_bound_share"] = span.host_bound
        self._reset()
        return logs


def _is_transformer(model: nn.Module) -> bool:
    text_config = getattr(getattr(model, "config", None), "get_text_config", None)
    return text_config is not None and hasattr(text_config(), "num_attention_heads")


def _peak_resident_gib() -> float:
    """Peak resident memory of this process, in GiB (Linux and macOS; 0 where it cannot be read)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**30 if sys.platform == "darwin" else 2**20)
