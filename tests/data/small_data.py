"""Encoders on the embedded world's tokenizer, and pairs of answers with all that training needs of them."""

import itertools

import jax
import numpy as np

from scir_jax.config.schema import TextConfig
from scir_jax.data.batches import RowGroup
from scir_jax.data.encode import Encoder, Marked
from scir_jax.data.packing import Packing
from scir_jax.data.pairs import Pair
from scir_jax.data.steps import PairSpec, TrainSpec
from scir_jax.model.segments import BRANCH
from scir_jax.text.chat import Chat
from scir_jax.text.judge import Template, compile_judge
from scir_jax.world.tokenizer import build_tokenizer

WORDS = ["".join(letters) for letters in itertools.islice(itertools.product("abcdefghij", repeat=3), 0, 1000, 90)]
CHAT = Chat(build_tokenizer(256), "world")
JUDGES = {
    "standalone": Template("s", "standalone", "judge {prompt}{response_a};{prompt}{response_b}", "", ("1", "2")),
    "continuation": Template("c", "continuation", "judge {prompt}{response_b}", "", ("1", "2")),
}
LAYOUTS = [
    ("standalone",),
    ("continuation",),
    ("continuation", "standalone"),
    ("standalone", "continuation"),
    ("continuation", "standalone", "continuation"),
    ("standalone", "standalone", "continuation"),
]


def make_encoder(*layouts, **text):
    """An encoder with a judge of each layout; `text` changes its limits."""
    limits = dict(max_prompt_tokens=24, max_response_tokens=8) | text
    judges = [compile_judge(JUDGES[layout], CHAT) for layout in layouts or ("standalone",)]
    return Encoder(TextConfig(**limits), CHAT, judges, 256)


def make_pairs(encoder, count=len(WORDS), **values):
    """Pairs whose second answer was cut, with cached values that tell them apart; `values` are of each pair."""

    def pair(i: int, word: str) -> Pair:
        prompt = encoder.prompt([{"role": "user", "content": f"copy {word}="}], f"pairs.jsonl:{i + 1}")
        answers = encoder.sampled(CHAT.answer(word)), encoder.sampled(CHAT.encode_text(word[::-1]))
        cached = {
            "preference_logps": (-1.0 - i, -2.0),
            "implicit_logps": (-1.0, -2.0 - i),
            "start_logps": (-3.0, -4.0),
        }
        return Pair(prompt, *answers, **{"cached": cached, **values})

    return [pair(i, word) for i, word in enumerate(WORDS[:count])]


def make_spec(encoder, size, targets=None, *, judged=True, devices=1, micro=1, **values):
    """Batches of `size` pairs beside so many supervised rows of four tokens by name."""
    prompts = [pair.prompt for pair in make_pairs(encoder)]
    pairs = PairSpec.of(size, encoder.lengths(prompts), judged=judged, continued=encoder.continued, **values)
    groups = ((name, RowGroup((rows,), 4, 4)) for name, rows in (targets or {}).items())
    return TrainSpec(pairs, tuple(groups), devices, micro)


def step_of(spec, pairs, encoder, targets=None, share=np.arange):
    """A step of numbered pairs and of supervised rows by name, nothing of it packed."""
    rows = [(name, row) for name, found in (targets or {}).items() for row in found]
    laid = [[] if pair is None else spec.pairs.laid(pair[1], encoder, index=pair[0]) for pair in pairs]
    laid += [[spec.laid(name, row)] for name, row in rows]
    items = [tuple(one.size for one in item) for item in laid]
    packing = Packing("off", [spec.bound])
    return spec.batch(packing, spec.bound, spec.own(items), items, laid.__getitem__, pairs, encoder.chat.pad_id, share)


def read_of(batch, devices=1, micro=1):
    """What each pair of a batch reads: (places, tokens) of both answers, place of each verdict [G, 2], its cells."""
    cells = np.arange(devices * micro).reshape(devices, micro)
    size = len(batch.pairs.index) // devices
    found = []
    for i in range(len(batch.pairs.index)):
        of_micro = cells[:, i % size % micro]
        answers = []
        for number in batch.pairs.answer[i]:
            cell, k = of_micro[number // batch.rows.first.shape[1]], number % batch.rows.first.shape[1]
            span = slice(batch.rows.first[cell, k], batch.rows.first[cell, k] + batch.rows.length[cell, k])
            answers.append((int(cell), batch.rows.places[cell, span], tuple(batch.rows.targets[cell, span].tolist())))
        verdicts = []
        for numbers in batch.pairs.verdict[i]:
            at = [(of_micro[n // batch.rows.verdict.shape[1]], n % batch.rows.verdict.shape[1]) for n in numbers]
            verdicts.append([(int(cell), int(batch.rows.verdict[cell, v])) for cell, v in at])
        found.append((answers, verdicts))
    return found


def rows_of(batch, devices=1, micro=1):
    """The rows of each cell of a batch: (places of its tokens, their ids)."""
    found = []
    for device, part in np.ndindex(devices, micro):
        flat = []
        for ids, segments in zip(batch.rows.ids, batch.rows.segments, strict=True):
            both = (x.reshape(devices, -1, micro, x.shape[-1])[device, :, part].reshape(-1) for x in (ids, segments))
            flat.append(tuple(both))
        ids, segments = (np.concatenate(parts) for parts in zip(*flat))
        runs = {number: np.flatnonzero(segments == number) for number in sorted(set(segments.tolist()) - {0})}
        assert all((np.diff(run) == 1).all() for run in runs.values()), "a run's tokens lie behind one another"
        trunks = {number % BRANCH for number in runs if number >= BRANCH}
        places = [
            np.concatenate([runs[number % BRANCH], run]) if number >= BRANCH else run
            for number, run in runs.items()
            if number not in trunks
        ]
        found.append([(row, tuple(ids[row].tolist())) for row in places])
    return found


def marked_rows(count=7):
    """Supervised rows that their last token tells apart."""
    return [Marked((1, 2, i), (False, True, True)) for i in range(count)]


def same(a, b):
    """Asserts that two trees of arrays are equal."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def fits(abstract, arrays):
    """Asserts that arrays have the structure, shapes and types that are announced."""
    assert jax.tree.structure(abstract) == jax.tree.structure(arrays)
    for expected, found in zip(jax.tree.leaves(abstract), jax.tree.leaves(arrays), strict=True):
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
