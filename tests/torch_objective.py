"""The whole objective of a model in torch and transformers, float64.

It makes its own rows, one string at a time and without padding, and has its own formulas.
"""

import functools
import json
import shutil

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from scir_jax.model.hf import weights

STANDALONE, CONTINUATION = "judge.yaml", "judge_continuation.yaml"
ANSWER_TOKENS = 12
PROMPTS = ("copy abc=", "upper-reverse dbfbe=", "rotate eie=", "copy h=", "rotate aghceg=", "copy hha=")
# Text, and whether the stop token was sampled; one without it was cut, at ANSWER_TOKENS or before.
ANSWERS = (
    (("abc!", True), ("ab", True)),
    (("EBFBD", True), ("EBFBDabcdefg", False)),
    (("iee", True), ("", True)),
    (("hhhhhhhhhhhh", False), ("gggg!!", False)),
    (("ghcega!", True), ("G=;1 2\njudge", True)),
    (("hha!", True), ("hhahh", True)),
)


class Reference:
    """A model directory in torch, float64, one row at a time."""

    def __init__(self, directory):
        self.directory = directory
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_ids(self, answer):
        text, ended = answer
        return self.ids(text) + self.ids("</s>") * ended

    def log_softmax(self, ids):
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0], dim=-1)

    def behind(self, context, ids):
        """Log-probabilities of the whole vocabulary for each of the ids behind a context, [len(ids), V]."""
        return self.log_softmax([*context, *ids])[len(context) - 1 : -1]

    def logp(self, context, ids):
        """Log-probabilities of ids behind a context, [len(ids)]."""
        return self.behind(context, ids)[range(len(ids)), ids]

    def prompt_ids(self, prompt):
        return self.ids(f"<s><|user|>{prompt}<|assistant|>")

    def judge_context(self, layout, prompt, a, b):
        if layout == STANDALONE:
            return self.ids(f"<s><|user|>judge {prompt}{a[0]};{prompt}{b[0]}<|assistant|>")
        return self.ids(f"<s><|user|>{prompt}<|assistant|>{a[0]}</s><|user|>judge {prompt}{b[0]}<|assistant|>")

    def verdict(self, layout, prompt, a, b):
        """logit(A) - logit(B), and P(A) + P(B)."""
        table = self.log_softmax(self.judge_context(layout, prompt, a, b))[-1]
        first, second = self.ids("1")[0], self.ids("2")[0]
        return table[first] - table[second], (table[first].exp() + table[second].exp()).detach()

    def answer_logp(self, prompt, answer):
        return self.logp(self.prompt_ids(prompt), self.answer_ids(answer)).sum()

    def answer_entropy(self, prompt, answer):
        """Mean entropy at the answer's tokens."""
        table = self.behind(self.prompt_ids(prompt), self.answer_ids(answer))
        return -(table.exp() * table).sum(dim=-1).mean()

    @functools.cached_property
    def answer_logps(self):
        """[P, 2] of all answers, NumPy."""
        with torch.no_grad():
            return np.array([[self.answer_logp(x, y).item() for y in ys] for x, ys in zip(PROMPTS, ANSWERS)])

    def replay_means(self, config, templates):
        """Mean negative log-likelihood of the marked tokens of both files."""
        ift, eft = [], []
        for line in open(config.data.ift):
            user, assistant = (m["content"] for m in json.loads(line)["messages"])
            ift.append(self.logp(self.prompt_ids(user), self.ids(assistant + "</s>")))
        for line in open(config.data.eft):
            row = json.loads(line)
            good, bad = ((row[k], True) for k in ("chosen", "rejected"))
            assert max(len(self.answer_ids(x)) for x in (good, bad)) <= ANSWER_TOKENS
            for layout in templates:
                eft.append(self.logp(self.judge_context(layout, row["prompt"], good, bad), self.ids("1")))
                eft.append(self.logp(self.judge_context(layout, row["prompt"], bad, good), self.ids("2")))
        return -torch.cat(ift).mean(), -torch.cat(eft).mean()

    def gradients(self, loss, scratch):
        """d loss / d parameters as the code's own pytree."""
        self.model.zero_grad()
        loss.backward()
        scratch.mkdir(exist_ok=True)
        shutil.copy(self.directory / "config.json", scratch)
        gradients = {name: p.grad.float().contiguous() for name, p in self.model.named_parameters()}
        save_file(gradients, scratch / "model.safetensors")
        return weights.load(scratch)[1]


def cross(p, q):
    return -(p * q.log() + (1 - p) * (1 - q).log())


def divergence(p, q):
    return cross(p, q) - cross(p, p)


def consistency(ps, kind, sharpen):
    """The penalty of probabilities [P] against each other."""
    R = len(ps)
    if kind in ("kl", "cross_entropy"):
        function = divergence if kind == "kl" else cross
        return sum(function(ps[i], ps[j]) for i in range(R) for j in range(R) if i != j) / (R * (R - 1))
    if kind == "js":
        return sum(divergence(p, sum(ps) / R) for p in ps) / R
    if kind == "agreement":
        return -(torch.stack(ps).prod(dim=0) + (1 - torch.stack(ps)).prod(dim=0)).log()
    target = torch.sigmoid(sum(torch.logit(p) for p in ps).detach() / R / sharpen)
    return sum(cross(target, p) for p in ps) / R


def certainty(logits, power):
    """1 less the information, in bits, that the choice of a prediction gives about the outcome; logits [P, S]."""
    p = torch.sigmoid(logits)
    return (1 - divergence(p, p.mean(dim=1, keepdim=True)).mean(dim=1) / np.log(2)) ** power


def objective(reference, rows, config, templates, judged):
    """(loss, what is compared beside it: means, decisions). `rows` are those of a file of pairs.

    Args:
      judged: the step asks the judge, and what it says is among the means and decisions.
    """
    size = range(len(rows))

    def of_answers(function):
        return torch.stack([torch.stack([function(PROMPTS[i], y) for y in ANSWERS[i]]) for i in size])

    logps = of_answers(reference.answer_logp)
    orders = [((a, b), (b, a)) for a, b in ANSWERS]
    read = [[[reference.verdict(t, PROMPTS[i], *order) for order in orders[i]] for t in templates] for i in size]
    z = torch.stack([torch.stack([torch.stack([v for v, _ in both]) for both in of_pair]) for of_pair in read])

    def column(*path):
        values = functools.reduce(lambda found, key: [row[key] for row in found], path, rows)
        return torch.tensor(values, dtype=torch.float64)

    weight = column("weight")
    lengths = torch.tensor([[len(row["response_a_ids"]), len(row["response_b_ids"])] for row in rows])
    r = config.implicit.beta * (logps - column("cached", "implicit_logps"))
    r = {"none": r, "mean": r / lengths, "penalty": r - column("length_penalty")[:, None] * lengths}[
        config.implicit.length
    ]
    start = column("cached", "start_logps") / (lengths if config.rewards.likelihood_length == "mean" else 1)
    one = torch.tensor([[[True, False], [False, True]][i % 2] for i in size])[:, None]  # every other pair is turned
    asked = one if config.judge.orders == "one" else torch.ones_like(one)
    favour = z * torch.tensor([1.0, -1.0])
    kinds = {
        "generative": (favour * asked).sum(dim=2) / asked.sum(dim=2),  # [P, G]
        "implicit": r[:, :1] - r[:, 1:],
        "likelihood": start[:, :1] - start[:, 1:],
    }
    if "entropy" in config.rewards.models:
        h = config.rewards.entropy_scale * of_answers(reference.answer_entropy)
        kinds["entropy"] = h[:, 1:] - h[:, :1]
    names = [n for n in config.rewards.models for _ in range(kinds[n].shape[1])]
    logits = torch.cat([kinds[n] for n in config.rewards.models], dim=1)
    held = logits.detach()
    frozen = torch.cat([column("frozen_logits", n) for n in config.rewards.models], dim=1)

    def consensus(of):
        share = [config.rewards.weights.get(n, 0) / names.count(n) for n in names]
        return (of * torch.tensor(share, dtype=torch.float64)).sum(dim=1)

    choice = config.preference
    source = frozen if choice.update == "frozen" else held
    if choice.labels == "external":
        q = column("label")
    else:
        by_name = {n: source[:, [m == n for m in names]].mean(dim=1) for n in config.rewards.models}
        logit = ({"agreement": source.mean(dim=1), "consensus": consensus(source)} | by_name)[choice.labels]
        q = torch.sigmoid(logit) if choice.soft else (logit > 0).double()
    assert (q != 0.5).all()
    p = torch.sigmoid(held)
    level = config.selection.confidence
    agreed = (p > 0.5 + level).all(dim=1) | (p < 0.5 - level).all(dim=1)
    share = {"agreement": agreed.double(), "certainty": certainty(column("verdicts"), config.selection.power)}
    chosen = weight * share.get(config.selection.rule, torch.ones(len(rows)))

    ratio = (logps - column("cached", "preference_logps")) / (lengths if choice.length_normalised else 1)
    m = ratio[:, 0] - ratio[:, 1]
    losses = []
    for side in (m, -m):
        if choice.loss == "sigmoid":
            losses.append(-torch.sigmoid(choice.beta * side).log())
        elif choice.loss == "ipo":
            losses.append((side - 1 / (2 * choice.beta)) ** 2)
        else:
            losses.append(torch.clamp(1 - choice.beta * side, min=0))
    q_ = q + choice.label_smoothing * (1 - 2 * q)
    losses = q_ * losses[0] + (1 - q_) * losses[1]

    settings = config.consistency
    ps = [torch.sigmoid((held if n == settings.stop_gradient else logits)[:, i]) for i, n in enumerate(names)]
    if settings.target == "mutual":
        penalty = consistency(ps, settings.kind, settings.sharpen)
    else:
        teacher = torch.sigmoid(consensus(frozen))
        one_way = {"kl": divergence, "cross_entropy": cross}.get(
            settings.kind, lambda t, x: consistency([t, x], settings.kind, settings.sharpen)
        )
        penalty = sum(one_way(teacher, x) for x in ps) / len(ps)

    def mean(values, weights=weight):
        return (values * weights).sum() / weights.sum() if weights.any() else torch.zeros(())

    ift, eft = reference.replay_means(config, templates) if config.replay.weight else (0, 0)
    preference, penalty = mean(losses, chosen), mean(penalty)
    loss = choice.weight * preference + settings.weight * penalty + config.replay.weight * (ift + eft)
    means = {"preference": preference, "selected": mean((chosen > 0).double())}
    decisions = {"p_implicit": torch.sigmoid(kinds["implicit"][:, 0]), "selected": chosen > 0, "label": q}
    decisions["weight"] = chosen
    if judged:
        mass = torch.stack([torch.stack([torch.stack([m for _, m in both]) for both in of_pair]) for of_pair in read])
        means |= {
            "consistency": penalty,
            "agreement": mean(agreed.double()),
            "generative/verdict_mass": mean(((mass * asked).sum(dim=2) / asked.sum(dim=2)).mean(dim=1)),
        }
        if config.judge.orders == "both":
            means["generative/slot_bias"] = mean(z.mean(dim=(1, 2)))
            means["generative/flip_rate"] = mean((z[..., 0] * z[..., 1] > 0).double().mean(dim=1))
        decisions |= {"p_generative": torch.sigmoid(kinds["generative"]), "agreed": agreed}
    if config.replay.weight:
        means |= {"sft/ift": ift, "sft/eft": eft}
    return loss, means, {name: value.detach().numpy() for name, value in decisions.items()}
