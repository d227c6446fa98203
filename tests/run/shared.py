"""Programs that the runs of one process have in common: each is traced and compiled once, whichever run asks first."""

import contextlib
import dataclasses
from functools import cached_property

import jax

from scir_jax.config.schema import Config
from scir_jax.engine.programs import Programs
from scir_jax.engine.sampler import Sampler
from scir_jax.engine.trainer import Trainer

# Sections that no loss reads; what they say of a batch stands in its description.
ELSEWHERE = ("run", "world", "data", "text", "sft", "sample", "checkpoint", "evaluate")


class SharedPrograms(Programs):
    """Programs whose functions are those of earlier ones of the same model, batches and settings.

    Attributes:
      found: (kind, description) -> function or trainer.
    """

    found: dict[tuple[str, str], object] = {}

    @classmethod
    @contextlib.contextmanager
    def anew(cls):
        """Inside, nothing is known of earlier runs. Gives a dict; in the end it has the cached entries of each kind."""
        # JAX counts the variants of the first 8,192 jitted functions of a process only.
        jax.clear_caches()
        before, cls.found, sizes = cls.found, {}, {}
        yield sizes
        for (kind, _), made in cls.found.items():
            functions = (made.step, made._init) if isinstance(made, Trainer) else (made,)
            functions = (made.admit, made.decode) if isinstance(made, Sampler) else functions
            sizes.setdefault(kind, []).extend(function._cache_size() for function in functions)
        cls.found = before | cls.found

    def _once(self, kind, make, *of):
        """make(), or what was made for the same model and the same values before."""
        model = dataclasses.replace(self.config.model, path="")
        key = kind, repr((self.arch, model, self.model.lora, dict(self.mesh.shape), of))
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]

    @property
    def _training(self):
        """What of the section is compiled: a step takes the learning rate as an argument."""
        return dataclasses.replace(self.config.training, warmup=0, schedule="constant", final=0, max_skipped=1)

    @cached_property
    def sampler(self):
        make = Programs.sampler.func
        return self._once("sampler", lambda: make(self), self.slot_spec, self.facts.stop_ids, self.facts.pad_id)

    @cached_property
    def scorer(self):
        return self._once("scorer", lambda: Programs.scorer.func(self), self.facts.lengths.answer, self.spans)

    @cached_property
    def judge(self):
        return self._once("judge", lambda: Programs.judge.func(self), self.facts.verdict_ids)

    @cached_property
    def sft(self):
        return self._once("sft", lambda: Programs.sft.func(self), self._training, self.way)

    @cached_property
    def optimise(self):
        default = {name: getattr(Config(), name) for name in ELSEWHERE}
        config = dataclasses.replace(self.config, **default, model=Config().model, training=self._training)
        make = Programs.optimise.func
        return self._once("optimise", lambda: make(self), config, self.optimise_spec, self.way, self.facts.verdict_ids)
