"""What a decoder computes: a declarative description of sizes and features, the same for every family."""

from __future__ import annotations

import dataclasses

import numpy as np

# Linear layers of a block, as Hugging Face names them, and where their parameters are.
LINEARS = {
    "q_proj": ("attention", "q"),
    "k_proj": ("attention", "k"),
    "v_proj": ("attention", "v"),
    "o_proj": ("attention", "o"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
      kind: "default"; "linear" (all frequencies divided by `factor`); "llama3" (low frequencies divided by `factor`,
        high ones kept, those between interpolated; Llama 3.1).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Computes the radians per position of each pair of dimensions, [head_dim / 2] float32.

        It runs on the host: an accelerator's float32 power is too coarse for positions in the thousands.
        """
        half = head_dim // 2
        frequencies = self.theta ** (-np.arange(half) / half)
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        elif self.kind == "llama3":
            turns = self.original_positions * frequencies / (2 * np.pi)  # over the original context
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = np.clip(kept, 0, 1)
            frequencies = frequencies * (kept + (1 - kept) / self.factor)
        return frequencies.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What differs from layer to layer. With a window, a position sees itself and the window - 1 before it."""

    window: int | None = None
    rope: Rope = Rope()


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and a gated feed-forward layer."""

    family: str  # model_type of config.json
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    max_positions: int = 4096
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalised, each head on its own, before they are rotated
    post_norms: bool = False  # the outputs of attention and feed-forward are normalised too
    norm_offset: float = 0.0  # added to every norm's scale (Gemma: 1)
    activation: str = "silu"
    embed_scale: float = 1.0
    query_scale: float | None = None  # of the attention scores; None: head_dim ** -0.5
    attention_cap: float | None = None  # scores become cap * tanh(scores / cap)
    final_cap: float | None = None  # likewise the logits
    reward: bool = False  # the head gives one number, a reward, instead of a logit for each token of the vocabulary

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kinds(self) -> tuple[Layer, ...]:
        """The different layers."""
        return tuple(dict.fromkeys(self.layers))

    def linear_axes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Returns the sizes of the output and of the input axes of each of LINEARS."""
        width, inner = (self.hidden_size,), (self.intermediate_size,)
        queries, keys = (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        return {
            "q_proj": (queries, width),
            "k_proj": (keys, width),
            "v_proj": (keys, width),
            "o_proj": (width, queries),
            "gate_proj": (inner, width),
            "up_proj": (inner, width),
            "down_proj": (width, inner),
        }

    def parameter_count(self) -> int:
        """Counts the weights, a tied head once."""
        d, f, v = self.hidden_size, self.intermediate_size, self.vocab_size
        queries, keys = self.head_dim * self.num_heads, self.head_dim * self.num_kv_heads
        layer = 2 * d * (queries + keys) + 3 * d * f + (4 if self.post_norms else 2) * d
        layer += self.qkv_bias * (queries + 2 * keys) + self.o_bias * d + self.mlp_bias * (2 * f + d)
        layer += self.qk_norm * 2 * self.head_dim
        head = 0 if self.tie_embeddings else d if self.reward else v * d
        return self.num_layers * layer + v * d + head + d
