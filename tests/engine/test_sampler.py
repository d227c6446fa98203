"""The sampler: its distribution, its independence of batching, where answers end."""

import jax
import numpy as np
import pytest
import torch
import transformers

from scir_jax.config.schema import MeshConfig
from scir_jax.data.batches import SlotSpec
from scir_jax.data.bins import Laid
from scir_jax.data.encode import Row
from scir_jax.data.reading import ReadSpec
from scir_jax.engine import forward
from scir_jax.engine import mesh as meshes
from scir_jax.engine.sampler import Sampler, Sampling, choose, limit, stream_key
from scir_jax.model import decoder
from scir_jax.model.architecture import Architecture, Layer
from scir_jax.run import sampling
from scir_jax.run.setup import prepare
from tests.processes import quick_jit

pytestmark = pytest.mark.usefixtures("few_functions", "cheap_compilation")

ARCH = Architecture("mistral", 23, 32, 48, 4, 2, 8, layers=(Layer(window=9), Layer()), max_positions=64)
STOPS, PAD = (2, 5), 7
PROMPT, RESPONSE, N = 10, 12, 3
LENGTHS = (1, 4, PROMPT, 7)
ONE = Sampling.of(1.0)
CHOOSE, LIMIT = quick_jit(choose), quick_jit(limit)


class Small:
    """A random model and its compiled samplers."""

    def __init__(self):
        self.model = decoder.define(ARCH)
        init = quick_jit(self.model.init)(jax.random.key(1))
        self.params = jax.tree_util.tree_map_with_path(lambda path, p: p if path[-1].key == "scale" else 10 * p, init)
        self._table = quick_jit(
            lambda params, row: jax.nn.log_softmax(self.model.hidden(params, row)[0] @ self.model.head(params).T)
        )
        self.mesh = meshes.make_mesh(MeshConfig())
        self.samplers = {}
        self.scorer = quick_jit(lambda params, rows: forward.score(self.model, params, rows, RESPONSE)["logps"])
        rng = np.random.default_rng(0)
        self.ids = rng.integers(0, ARCH.vocab_size, (len(LENGTHS), PROMPT)).astype(np.int32)
        self.lengths = np.array(LENGTHS, np.int32)
        self.index = np.array([3, 0, 11, 5], np.int32)

    def sampler(self, stop_ids=STOPS, prompts=len(LENGTHS), slots=len(LENGTHS) * N):
        if (stop_ids, prompts, slots) not in self.samplers:
            spec = SlotSpec(slots, prompts, (PROMPT,), RESPONSE, PROMPT + RESPONSE)
            made = Sampler(self.model, self.mesh, spec, stop_ids=stop_ids, pad_id=PAD)
            self.samplers[stop_ids, prompts, slots] = made, spec
        return self.samplers[stop_ids, prompts, slots]

    def __call__(self, *, ids=None, lengths=None, index=None, key=None, sampling=ONE, stop_ids=STOPS):
        """(ids [B, N, R], lengths [B, N], logps [B, N]) as NumPy; the four prompts unless others are given."""
        given = (ids, lengths, index)
        ids, lengths, index = [a if a is not None else b for a, b in zip(given, (self.ids, self.lengths, self.index))]
        key = stream_key(0, "responses", 1) if key is None else key
        sampler, spec = self.sampler(stop_ids, len(ids), len(ids) * N)
        prompts = [(int(number), row[:length]) for number, row, length in zip(index, ids, lengths)]
        answers = {N * i + n: (i, n) for i, number in enumerate(index) if number >= 0 for n in range(N)}
        coming = spec.arrays(ids.shape[1], prompts, answers, PAD)
        slots = sampler.admit(self.params, sampler.empty(), coming)
        slots, done = sampler.decode(self.params, slots, key, sampling, np.int32(spec.slots))
        assert np.asarray(done).all(), "no answer is longer than a segment"
        tokens, counts, logps = (np.asarray(x) for x in sampler.read(slots))
        return tokens.reshape(-1, N, RESPONSE), counts.reshape(-1, N), logps.reshape(-1, N)

    def logprobs(self, prompt, response):
        """log-probabilities [R, V] at the places of a response, from whole rows."""
        row = np.zeros((1, PROMPT + RESPONSE), np.int32)
        row[0, : len(prompt) + len(response)] = [*prompt, *response]
        return np.asarray(self._table(self.params, row))[len(prompt) - 1 : len(prompt) + len(response) - 1]


@pytest.fixture(scope="module")
def small():
    return Small()


# --- log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [ONE, Sampling.of(0.7, 0.9, 15)], ids=["plain", "limited"])
def test_logprobs_are_the_scorers(small, settings):
    tokens, counts, logps = small(sampling=settings)
    stopped = np.isin(np.take_along_axis(tokens, counts[..., None] - 1, axis=2)[..., 0], STOPS)
    assert stopped.any() and not stopped.all()  # both kinds are there to be compared
    rows = [
        Row((*small.ids[b, :prompt].tolist(), *tokens[b, n, : counts[b, n]].tolist()), prompt, int(counts[b, n]))
        for b, prompt in enumerate(LENGTHS)
        for n in range(N)
    ]
    spec = ReadSpec(len(rows), PROMPT + RESPONSE, RESPONSE, 1)
    scored = small.scorer(small.params, spec.arrays([[Laid.of(0, [row])] for row in rows], PAD))[:, 0]
    np.testing.assert_allclose(logps.reshape(-1), scored, rtol=0, atol=1e-4)
    response = tokens[1, 0, : counts[1, 0]]
    table = small.logprobs(small.ids[1, : LENGTHS[1]], response)
    np.testing.assert_allclose(logps[1, 0], table[np.arange(len(response)), response].sum(), rtol=0, atol=1e-4)


# --- randomness -------------------------------------------------------------------------------------------------------


def test_a_row_is_the_same_in_any_batch(small):
    tokens, counts, logps = small()
    # Other places, other company, padding rows, and other ids where a prompt has none.
    order = [2, 1, 0, 3]
    index = small.index[order].copy()
    index[1] = -1
    lengths = small.lengths[order]
    ids = np.where(np.arange(PROMPT) < lengths[:, None], small.ids[order], 19)
    ids[3], index[3], lengths[3] = 4, 99, 2
    other = small(ids=ids, index=index, lengths=lengths)
    for here, there in ((0, 2), (2, 0)):
        np.testing.assert_array_equal(other[0][here], tokens[there])
        np.testing.assert_array_equal(other[1][here], counts[there])
        np.testing.assert_allclose(other[2][here], logps[there], rtol=0, atol=1e-5)
    assert not np.array_equal(other[0][3], tokens[3])
    # A padding row has no tokens.
    assert (other[1][1] == 0).all() and (other[2][1] == 0).all()


def test_a_row_is_the_same_in_batches_of_other_shapes(small):
    tokens, counts, logps = small()
    wide = np.pad(small.ids[1:3], [(0, 0), (0, 6)], constant_values=9)
    other = small(ids=wide, lengths=small.lengths[1:3], index=small.index[1:3])
    np.testing.assert_array_equal(other[0], tokens[1:3])
    np.testing.assert_array_equal(other[1], counts[1:3])
    np.testing.assert_allclose(other[2], logps[1:3], rtol=0, atol=1e-5)


def test_a_slot_that_is_taken_again_is_as_a_fresh_one(small):
    sampler, spec = small.sampler()
    key, until = stream_key(0, "responses", 1), np.int32(spec.slots)

    def sampled(slots, lengths, index):
        prompts = [(i, ids[:length]) for i, ids, length in zip(index, small.ids, lengths, strict=True)]
        answers = {N * i + n: (i, n) for i in range(len(index)) for n in range(N)}
        slots = sampler.admit(small.params, slots, spec.arrays(PROMPT, prompts, answers, PAD))
        return sampler.decode(small.params, slots, key, ONE, until)[0]

    read = lambda slots: jax.tree.map(np.asarray, sampler.read(slots))  # noqa: E731
    fresh = read(sampled(sampler.empty(), (2, 1, 5, 3), range(4)))
    before = sampled(sampler.empty(), LENGTHS[::-1], range(10, 14))
    for here, there in zip(read(sampled(before, (2, 1, 5, 3), range(4))), fresh, strict=True):
        np.testing.assert_array_equal(here, there)


def test_sample_prompt_iteration_stream_and_seed_give_other_noise(small):
    # So hot that every token is all but uniform: what differs is the noise.
    hot = Sampling.of(1e6)
    same = np.repeat(small.ids[:1], 4, axis=0)
    numbers = np.array([0, 1, 2, 3], np.int32)
    keys = [("responses", 1, 0), ("responses", 2, 0), ("evaluation", 1, 0), ("responses", 1, 1)]
    rows = []
    for stream, iteration, seed in keys:
        tokens, _, _ = small(
            ids=same,
            index=numbers,
            lengths=np.full(4, 6, np.int32),
            key=stream_key(seed, stream, iteration),
            sampling=hot,
            stop_ids=(),
        )
        rows.append(tokens.reshape(-1, RESPONSE))
    rows = np.concatenate(rows)
    assert len({tuple(row) for row in rows}) == len(rows) == len(keys) * 4 * N
    # No two rows share more places than chance explains, and a row's places do not repeat one another's.
    pairs = [(rows[i] == rows[j]).mean() for i in range(len(rows)) for j in range(i)]
    assert max(pairs) <= 0.5 and abs(np.mean(pairs) - 1 / ARCH.vocab_size) < 0.01
    assert abs((rows[:, 1:] == rows[:, :-1]).mean() - 1 / ARCH.vocab_size) < 0.03


def test_the_same_key_gives_the_same_samples(small):
    for a, b in zip(small(), small(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_setting_compiles_again(small):
    compiled = small.sampler()[0].decode._cache_size
    small(sampling=ONE)
    before = compiled()
    assert before > 0
    settings = (ONE, Sampling.of(0.0), Sampling.of(3.0), Sampling.of(3.0, 0.5), Sampling.of(3.0, 1.0, 2))
    seen = [small(sampling=s)[0] for s in settings]
    small(key=stream_key(5, "evaluation", 3))
    assert compiled() == before
    assert len({tokens.tobytes() for tokens in seen}) == len(seen)  # and each setting is in force


# --- greedy -----------------------------------------------------------------------------------------------------------


def test_temperature_zero_is_the_argmax(small):
    tokens, counts, logps = small(sampling=Sampling.of(0.0))
    again = small(sampling=Sampling.of(0.0, 0.1, 3), key=stream_key(9, "evaluation", 4))
    np.testing.assert_array_equal(tokens, again[0])
    for b, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(tokens[b], np.broadcast_to(tokens[b, 0], (N, RESPONSE)))
        response = tokens[b, 0, : counts[b, 0]]
        table = small.logprobs(small.ids[b, :length], response)
        np.testing.assert_array_equal(table.argmax(axis=1), response)
        np.testing.assert_allclose(logps[b, 0], table.max(axis=1).sum(), rtol=0, atol=1e-4)


def test_greedy_is_that_of_transformers(world_dir, tiny_config):
    encoder, inputs, programs, parameters = prepare(tiny_config(world_dir))
    chat, prompts, key = encoder.chat, list(enumerate(inputs.prompts))[:8], jax.random.key(0)
    rows = sampling.sample_rows(
        encoder, programs, parameters.configured(), prompts, responses=1, sampling=Sampling.of(0.0), key=key
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(world_dir / "model").eval()
    settings = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=programs.facts.lengths.answer,
        eos_token_id=list(chat.stop_ids),
        pad_token_id=chat.pad_id,
        bos_token_id=None,
    )
    assert len({len(row["prompt_ids"]) for row in rows}) > 1
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            logits = model(whole).logits[0, ids.shape[1] - 1 : -1].double()
        response = whole[0, ids.shape[1] :]
        assert row["response_ids"] == response.tolist()
        assert row["stop"] == ("eos" if response[-1] in chat.stop_ids else "length")
        logprob = logits.log_softmax(1).gather(1, response[:, None]).sum()
        assert row["logprob"] == pytest.approx(logprob.item(), abs=1e-4)


# --- the distribution of a token --------------------------------------------------------------------------------------


def brute_force(scaled, top_p, top_k):
    """The kept tokens of one row by their definition; every token tied with the last one kept is kept too."""
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if top_k > 0:
        last = scaled[order[min(top_k, len(order)) - 1]]
        order = [i for i in order if scaled[i] >= last]
    weight = np.exp(np.array([scaled[i] for i in order], np.float64) - scaled[order[0]])
    weight /= weight.sum()
    count = 1 if top_p < 1 else len(order)
    while count < len(order) and weight[:count].sum() < top_p:
        count += 1
    return scaled >= scaled[order[count - 1]]


ROWS = np.concatenate(
    [
        np.random.default_rng(1).normal(0, 2, (6, 11)),
        [[0, 3, 3, 1, 3, -2, 0, 0, 0, 0, -9], [1] * 11, [-3, 0, 0, -3, 2, 2, 2, -3, 2, 9, 9]],
    ]
).astype(np.float32)


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 11, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.62, 0.95, 1.0])
def test_limit_is_the_definition(top_p, top_k):
    limited = np.asarray(LIMIT(ROWS, np.float32(top_p), np.int32(top_k)))
    for row, found in zip(ROWS, limited, strict=True):
        kept = brute_force(row, top_p, top_k)
        np.testing.assert_array_equal(found, np.where(kept, row, -np.inf))


def test_limit_keeps_one_token_at_least():
    distinct = ROWS[:6]
    for settings in ((1e-9, 0), (1.0, 1), (1e-9, 1)):
        kept = np.isfinite(np.asarray(LIMIT(distinct, np.float32(settings[0]), np.int32(settings[1]))))
        np.testing.assert_array_equal(kept, distinct == distinct.max(axis=1, keepdims=True))


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 0.8, 0), (1.0, 1.0, 4), (1.5, 0.7, 6)]
)
def test_draws_have_the_distribution(temperature, top_p, top_k):
    draws = 20_000
    logits = np.random.default_rng(2).normal(0, 1.2, 11).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), draws)
    tokens = np.asarray(CHOOSE(np.tile(logits, (draws, 1)), keys, Sampling.of(temperature, top_p, top_k)))
    scaled = logits / temperature
    kept = brute_force(scaled, top_p, top_k)
    expected = np.where(kept, np.exp(scaled.astype(np.float64)), 0)
    expected *= draws / expected.sum()
    counted = np.bincount(tokens, minlength=11)
    assert (counted[~kept] == 0).all()
    chi_square = ((counted - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_row(small):
    index = np.arange(4, dtype=np.int32)
    last = []
    for iteration in range(4):
        tokens, counts, _ = small(index=index, key=stream_key(0, "responses", iteration), sampling=Sampling.of(3.0))
        for row, count in zip(tokens.reshape(-1, RESPONSE), counts.reshape(-1), strict=True):
            assert 1 <= count <= RESPONSE
            assert not np.isin(row[: count - 1], STOPS).any()
            assert (row[count:] == PAD).all()
            if count < RESPONSE:
                assert row[count - 1] in STOPS
            last.append(int(row[count - 1]))
    assert set(STOPS) < set(last)  # either stop token has ended rows, and others were cut


def test_stop_tokens_change_only_where_a_row_ends(small):
    free, _, _ = small(sampling=Sampling.of(3.0), stop_ids=())
    tokens, counts, _ = small(sampling=Sampling.of(3.0))
    pairs = zip(free.reshape(-1, RESPONSE), tokens.reshape(-1, RESPONSE), counts.reshape(-1), strict=True)
    for row, found, count in pairs:
        places = np.flatnonzero(np.isin(row, STOPS))
        end = places[0] + 1 if len(places) else RESPONSE
        assert count == end
        np.testing.assert_array_equal(found[:end], row[:end])
    assert (counts < RESPONSE).any()
