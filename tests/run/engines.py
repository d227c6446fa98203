"""Small engines for sample.command: one that makes answers up, one that samples with transformers."""

# Answers are three letters and the stop token; no import of the project, as another engine has none.
MADE_UP = """
import json, sys
prompts, output, responses = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(output, "w") as file:
    for line in open(prompts):
        row = json.loads(line)
        for n in range(responses):
            ids = [IDS[(row["prompt_number"] + k * (n + 1)) % len(IDS)] for k in range(3)] + [STOP]
            file.write(json.dumps({**row, "response_ids": ids}) + "\\n")
print("answered")
"""

TRANSFORMERS = """
import argparse, json
import torch, transformers
parser = argparse.ArgumentParser()
for name in ("model", "prompts", "output", "responses", "max-tokens", "seed", "stop-ids"):
    parser.add_argument("--" + name, required=True)
given = parser.parse_args()
torch.manual_seed(int(given.seed))
model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
stops = {int(i) for i in given.stop_ids.split(",")}
with open(given.output, "w") as file, torch.no_grad():
    for line in open(given.prompts):
        row = json.loads(line)
        for _ in range(int(given.responses)):
            ids, logprob = [], 0.0
            while len(ids) < int(given.max_tokens) and not stops & set(ids):
                logps = model(torch.tensor([row["prompt_ids"] + ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(torch.multinomial(logps.exp(), 1)))
                logprob += float(logps[ids[-1]])
            text = tokenizer.decode(ids, skip_special_tokens=True)
            file.write(json.dumps({**row, "response": text, "response_ids": ids, "logprob": logprob}) + "\\n")
"""

# A stand-in for the part of vllm that configs/engines/vllm_offline.py uses.
VLLM = """
import dataclasses
@dataclasses.dataclass
class SamplingParams:
    n: int; temperature: float; top_p: float; top_k: int; max_tokens: int; stop_token_ids: list; seed: int
    logprobs: int; skip_special_tokens: bool
@dataclasses.dataclass
class Completion:
    text: str; token_ids: tuple; cumulative_logprob: float; finish_reason: str
@dataclasses.dataclass
class Result:
    outputs: list
class LLM:
    def __init__(self, model, max_model_len, seed):
        assert model and max_model_len > 0
    def generate(self, prompts, params):
        assert all(list(p) == ["prompt_token_ids"] for p in prompts) and len(prompts) == len(params)
        assert len({p.seed for p in params}) == len(params) and params[0].top_k == -1 and params[0].logprobs == 0
        stop = params[0].stop_token_ids[0]
        made = [[IDS[(len(p["prompt_token_ids"]) + n) % len(IDS)], stop] for p in prompts for n in range(params[0].n)]
        made = [Completion(TEXTS[str(ids[0])], tuple(ids), -1.5, "stop") for ids in made]
        return [Result(made[i : i + params[0].n]) for i in range(0, len(made), params[0].n)]
"""
