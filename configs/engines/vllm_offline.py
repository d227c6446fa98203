"""Answers a file of prompts with vLLM's offline API, token ids in and token ids out.

It imports nothing of scir_jax, so that it may run in an environment of its own, where vLLM is installed.
"""

import argparse
import json
from pathlib import Path

import vllm


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON Lines with prompt_ids")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines: each prompt's row with an answer")
    parser.add_argument("--responses", type=int, default=1, help="answers to a prompt")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer, with its stop token")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0: no limit")
    parser.add_argument("--stop-ids", default="", help="token ids that end an answer, with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="of vllm.LLM, as a JSON object")
    arguments = parser.parse_args()

    rows = [json.loads(line) for line in arguments.prompts.read_text(encoding="utf-8").split("\n") if line]
    longest = max(len(row["prompt_ids"]) for row in rows)
    options = {"max_model_len": longest + arguments.max_tokens, "seed": arguments.seed, **arguments.options}
    engine = vllm.LLM(model=arguments.model, **options)

    def sampling(row: dict) -> vllm.SamplingParams:
        return vllm.SamplingParams(
            n=arguments.responses,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k or -1,
            max_tokens=arguments.max_tokens,
            stop_token_ids=[int(i) for i in arguments.stop_ids.split(",") if i],
            # One seed for all prompts would give prompts that are alike the same noise.
            seed=(arguments.seed + 7919 * row["prompt_number"]) % 2**31,
            # The log-probabilities of the tokens themselves, before the temperature; scir_jax compares them.
            logprobs=0,
            skip_special_tokens=False,
        )

    # Ids, not texts: a chat template must not be applied twice, nor a text be tokenised otherwise.
    prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in rows]
    results = engine.generate(prompts, [sampling(row) for row in rows])
    with arguments.output.open("w", encoding="utf-8") as file:
        for row, result in zip(rows, results, strict=True):
            for answer in result.outputs:
                given = {
                    "response": answer.text,
                    "response_ids": list(answer.token_ids),
                    "logprob": min(answer.cumulative_logprob, 0.0),
                    "stop": answer.finish_reason,
                }
                file.write(json.dumps({**row, **given}) + "\n")


if __name__ == "__main__":
    main()
