"""Reading a config.json: every value is checked, and a setting that the decoder does not compute is refused."""

from __future__ import annotations

from typing import Any

from scir_jax.errors import InputError
from scir_jax.model.architecture import Architecture, Layer, Rope

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


class Reader:
    """A parsed config.json; `where` names it in messages."""

    def __init__(self, config: dict[str, Any], where: str):
        self.config = config
        self.where = where

    def get(self, key: str, absent: Any = None) -> Any:
        """Returns the value at a key, `absent` where the key is missing."""
        return self.config.get(key, absent)

    def integer(
        self,
        key: str,
        absent: int | None = None,
        null: int | None = None,
        *,
        least: int = 1,
        of: dict[str, Any] | None = None,
    ) -> int:
        """Reads the integer, `least` or more, at `key` of the config, or of the object `of` inside it.

        Args:
          absent, null: stand in for a key that is missing, or null.

        Raises:
          InputError: the key is missing, or its value is no such integer.
        """
        value = (self.config if of is None else of).get(key, absent)
        value = null if value is None else value
        if value is None:
            raise InputError(f"{self.where}: the key {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise InputError(f"{self.where}: {key} must be {kind}, not {value!r}")
        return value

    def positive(self, key: str, absent: float | None = None, *, of: dict[str, Any] | None = None) -> float:
        """Reads the positive number at `key` of the config, or of the object `of` inside it.

        Raises:
          InputError: the value is no such number.
        """
        value = (self.config if of is None else of).get(key, absent)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise InputError(f"{self.where}: {key} must be a positive number, not {value!r}")
        return float(value)

    def optional(self, key: str, absent: float | None = None) -> float | None:
        """Reads a positive number or null.

        Raises:
          InputError: the value is neither.
        """
        return None if self.config.get(key, absent) is None else self.positive(key, absent)

    def flag(self, key: str, absent: bool = False) -> bool:
        """Reads true or false; null is false.

        Raises:
          InputError: the value is none of them.
        """
        value = self.config.get(key, absent)
        if value not in (True, False, None):
            raise InputError(f"{self.where}: {key} must be true or false, not {value!r}")
        return bool(value)

    def refuse(self, *keys: str) -> None:
        """Refuses settings that are on and that this decoder does not compute.

        Raises:
          InputError: one of them is on.
        """
        for key in keys:
            if self.config.get(key):
                raise InputError(f"{self.where}: {key} is {self.config[key]!r}, which is not supported")

    def activation(self, key: str, absent: str) -> str:
        """Reads the name of an activation, and returns the decoder's name for it.

        Raises:
          InputError: the decoder does not have it.
        """
        value = self.config.get(key, absent)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise InputError(f"{self.where}: {key} is {value!r}; supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def layer_types(self, default: list[str]) -> list[str]:
        """Reads whether each layer has full or sliding attention.

        Args:
          default: where the config does not say; it has one entry per layer.

        Raises:
          InputError: a type is unknown, or their number is not that of the layers.
        """
        types = self.config.get("layer_types") or default
        if not isinstance(types, list):
            raise InputError(f"{self.where}: layer_types must be a list of {FULL} and {SLIDING}, not {types!r}")
        unknown = [kind for kind in types if kind not in (FULL, SLIDING)]
        if unknown:
            raise InputError(f"{self.where}: layer_types has {unknown[0]!r}; supported are {FULL} and {SLIDING}")
        if len(types) != len(default):
            raise InputError(f"{self.where}: layer_types has {len(types)} layers, num_hidden_layers {len(default)}")
        return types

    def layers(self, types: list[str], window: int | None) -> tuple[Layer, ...]:
        """Makes layers of these types, of which only the sliding ones have a window."""
        kinds = {kind: Layer(window if kind == SLIDING else None, self.rope(kind)) for kind in dict.fromkeys(types)}
        return tuple(kinds[kind] for kind in types)

    def rope(self, layer_type: str = FULL, theta: float = 10000.0) -> Rope:
        """Reads rotary positions: in rope_parameters (new, maybe by layer type), or rope_theta and rope_scaling (old).

        Raises:
          InputError: as `rope_of` does.
        """
        # transformers as well lets an old rope_scaling win
        key = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        found = self.config.get(key) or {}
        if isinstance(found, dict) and {FULL, SLIDING} & set(found):
            found = found.get(layer_type) or {}
        return self.rope_of(found, key, self.positive("rope_theta", theta))

    def rope_of(self, found: Any, key: str, theta: float) -> Rope:
        """Reads the Rope of one object of rotary settings, with `theta` where it has none.

        Raises:
          InputError: the decoder does not compute such positions, or a setting of theirs is missing or out of its
            range.
        """
        if not isinstance(found, dict):
            raise InputError(f"{self.where}: {key} must be an object, not {found!r}")
        kind = found.get("rope_type", found.get("type", "default"))
        partial = found.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise InputError(f"{self.where}: partial_rotary_factor is {partial!r}, but only 1 is supported")
        theta = self.positive("rope_theta", theta, of=found)
        if kind == "default":
            return Rope(theta)
        if kind not in ("linear", "llama3"):
            raise InputError(
                f"{self.where}: {key} asks for the rope type {kind!r}; supported are default, linear and llama3"
            )
        factor = self.positive("factor", of=found)
        if kind == "linear":
            return Rope(theta, kind, factor)
        original = self.integer("max_position_embeddings")
        if found.get("original_max_position_embeddings"):
            original = self.integer("original_max_position_embeddings", of=found)
        low, high = (self.positive(f"{name}_freq_factor", of=found) for name in ("low", "high"))
        if high <= low:
            raise InputError(f"{self.where}: {key}: high_freq_factor must be greater than low_freq_factor")
        return Rope(theta, kind, factor, low, high, original)

    def architecture(self, *, kv_heads: int | None = None, head_dim: int | None = None, **values: Any) -> Architecture:
        """Reads the sizes that every family spells alike, and lays a family's own values over them.

        Args:
          kv_heads: what transformers assumes where num_key_value_heads is absent; as many as heads by default.
          head_dim: likewise; hidden_size / heads by default.

        Raises:
          InputError: a size is missing, or does not fit with the others.
        """
        heads = self.integer("num_attention_heads")
        width = self.integer("hidden_size")
        groups = self.integer("num_key_value_heads", kv_heads or heads, heads)
        if heads % groups:
            raise InputError(
                f"{self.where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
            )
        dim = self.integer("head_dim", head_dim or width // heads, width // heads)
        if dim % 2:
            raise InputError(f"{self.where}: head_dim is {dim}; rotary positions need an even number")
        shared = dict(
            vocab_size=self.integer("vocab_size"),
            hidden_size=width,
            intermediate_size=self.integer("intermediate_size"),
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=dim,
            norm_eps=self.positive("rms_norm_eps", 1e-6),
            tie_embeddings=self.flag("tie_word_embeddings"),
        )
        return Architecture(**{**shared, **values})
