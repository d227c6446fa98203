"""Sampling side by side: scir_jax, transformers' generate and vLLM, on the same model and the same prompts.

    python benchmarks/sample.py --size 1m --prompts 64

It makes a random Mistral of which some tokens in hundred end an answer, so that lengths are geometric with a long tail,
and prompts of log-normal lengths; then each contestant samples in a process of its own. One row per contestant. Needs
the extra [test], for torch; vLLM takes part where it is installed and there is a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from comparison import SIZES, alternate, make_case, parsed, write_figures

CONTESTANTS = ("transformers", "vllm", "scir_jax")
KEYS = ("size", "prompts", "responses", "batch", "longest", "answer", "mean", "dtype")


def make_prompts(directory: Path, arguments: argparse.Namespace) -> None:
    """Writes a model, and prompts without answers."""
    make_case(directory, arguments.size, arguments.prompts, arguments.longest)
    rows = [json.loads(line) for line in (directory / "pairs.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
    (directory / "prompts.jsonl").write_text(text)
    # As good as uniform logits: so many of the vocabulary's tokens end an answer after `mean` tokens in the mean.
    vocabulary = SIZES[arguments.size][-1]
    stops = np.random.default_rng(2).choice(vocabulary, max(vocabulary // arguments.mean, 1), replace=False)
    settings = {"eos_token_id": sorted(map(int, stops))}
    (directory / "model" / "generation_config.json").write_text(json.dumps(settings))


def prepared(directory: Path, arguments: argparse.Namespace):
    """Reads the case as scir_jax does."""
    from scir_jax.config.schema import Config, DataConfig, GenerativeConfig, ModelConfig, SampleConfig, TextConfig
    from scir_jax.run.setup import prepare

    config = Config(
        model=ModelConfig(path=str(directory / "model"), dtype=arguments.dtype),
        data=DataConfig(prompts=str(directory / "prompts.jsonl")),
        text=TextConfig(max_prompt_tokens=arguments.longest * 2 // 5 + 8, max_response_tokens=arguments.answer),
        sample=SampleConfig(batch_size=arguments.batch, responses=arguments.responses),
        generative=GenerativeConfig(templates=()),
    )
    return prepare(config, lambda encoder, inputs: encoder.lengths(inputs.prompts))


def run_jax(directory: Path, arguments: argparse.Namespace) -> dict:
    """Samples with scir_jax; its programs are compiled before."""
    from scir_jax.engine.sampler import Sampling, stream_key
    from scir_jax.run import sampling

    encoder, inputs, programs, parameters = prepared(directory, arguments)
    params = parameters.configured()
    for program in (*programs.prefill_programs, programs.decode_program()):
        program.compile(programs.mesh)
    decode, places = programs.sampler.decode, []

    def counted(params, slots, *settings):
        before, done = np.asarray(slots.lengths).copy(), np.asarray(slots.done).copy()
        slots, ended = decode(params, slots, *settings)
        grown = np.where(done, 0, np.asarray(slots.lengths) - before)
        places.append((int(grown.sum()), int(grown.max()) * len(grown)))
        return slots, ended

    programs.sampler.decode = counted
    settings = dict(responses=arguments.responses, sampling=Sampling.of(1.0), key=stream_key(0, "responses", 1))
    started = time.monotonic()
    rows = sampling.sample_rows(encoder, programs, params, list(enumerate(inputs.prompts)), **settings)
    seconds = time.monotonic() - started
    used, computed = np.sum(places, axis=0)
    tokens = sum(len(row["response_ids"]) for row in rows)
    return {"seconds": seconds, "tokens": tokens, "answers": len(rows), "used": float(used / computed)}


def run_torch(directory: Path, arguments: argparse.Namespace) -> dict:
    """Samples with generate, batch after batch; prompts are padded at the left."""
    import torch
    import transformers

    encoder, inputs, _, _ = prepared(directory, arguments)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32).eval()
    stops = list(encoder.chat.stop_ids)
    settings = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=arguments.answer,
        num_return_sequences=arguments.responses,
        eos_token_id=stops,
        pad_token_id=encoder.chat.pad_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    tokens = answers = computed = 0
    started = time.monotonic()
    for first in range(0, len(inputs.prompts), arguments.batch):
        part = inputs.prompts[first : first + arguments.batch]
        longest = max(len(prompt.ids) for prompt in part)
        ids = torch.full((len(part), longest), encoder.chat.pad_id)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(part):
            ids[i, longest - len(prompt.ids) :], mask[i, longest - len(prompt.ids) :] = torch.tensor(prompt.ids), 1
        with torch.no_grad():
            found = model.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:].numpy()
        ended = np.isin(found, stops)
        lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, found.shape[1])
        tokens, answers, computed = tokens + int(lengths.sum()), answers + len(found), computed + found.size
    return {
        "seconds": time.monotonic() - started,
        "tokens": tokens,
        "answers": answers,
        "used": tokens / computed,
    }


def run_vllm(directory: Path, arguments: argparse.Namespace) -> dict:
    """Samples with vLLM's offline engine, token ids in and out; its start is not timed."""
    import vllm

    encoder, inputs, _, _ = prepared(directory, arguments)
    longest = max(len(prompt.ids) for prompt in inputs.prompts)
    engine = vllm.LLM(str(directory / "model"), dtype=arguments.dtype, max_model_len=longest + arguments.answer, seed=0)
    settings = vllm.SamplingParams(
        n=arguments.responses, max_tokens=arguments.answer, stop_token_ids=list(encoder.chat.stop_ids), seed=0
    )
    prompts = [{"prompt_token_ids": list(map(int, prompt.ids))} for prompt in inputs.prompts]
    started = time.monotonic()
    found = [answer for result in engine.generate(prompts, settings) for answer in result.outputs]
    seconds = time.monotonic() - started
    tokens = sum(len(answer.token_ids) for answer in found)
    return {"seconds": seconds, "tokens": tokens, "answers": len(found), "used": float("nan")}


def with_vllm() -> bool:
    """Checks whether vLLM could run."""
    if importlib.util.find_spec("vllm") is None:
        return False
    import torch

    return torch.cuda.is_available()


def main() -> int:
    """Runs the contestants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1m", help="of the model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--responses", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--batch", type=int, default=8, help="prompts in a batch of generate; so many answers' slots")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of which two fifths bound a prompt")
    parser.add_argument("--answer", type=int, default=512, help="tokens of the longest answer")
    parser.add_argument("--mean", type=int, default=128, help="tokens of an answer in the mean, unless it is cut")
    parser.add_argument("--dtype", default="float32", help="that scir_jax computes in")
    arguments = parsed(parser, CONTESTANTS, repeat=1)
    if arguments.run:
        run = {"scir_jax": run_jax, "transformers": run_torch, "vllm": run_vllm}[arguments.run]
        result = run(arguments.case, arguments)
        print(json.dumps(result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
        return 0
    if not with_vllm():
        arguments.only = [name for name in arguments.only if name != "vllm"]
    with tempfile.TemporaryDirectory() as directory:
        make_prompts(Path(directory), arguments)
        found = alternate(__file__, arguments, directory, KEYS)
    print(
        f"{'contestant':<16}{'seconds':>9}{'answers':>9}{'tokens':>9}{'tokens/s':>10}{'slots used':>12}{'peak GiB':>10}"
    )
    for name, results in found.items():
        for one in results:
            print(
                f"{name:<16}{one['seconds']:>9.1f}{one['answers']:>9}{one['tokens']:>9,}"
                f"{one['tokens'] / one['seconds']:>10,.0f}{one['used']:>12.0%}{one['peak_gib']:>10.2f}"
            )
    write_figures(arguments, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
