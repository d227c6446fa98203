"""The wording of docstrings: a verb in the third person first, a full sentence, and "per" between units."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "scir_jax").rglob("*.py"))
TEXTS = sorted(
    path
    for folder, pattern in ((ROOT, "README.md"), (ROOT / "docs", "*.md"), (ROOT / "configs", "**/*.yaml"))
    for path in folder.glob(pattern)
)
TEXTS += [p for p in sorted((ROOT / "scir_jax").rglob("*")) if p.suffix in (".yaml", ".jinja")]

VERB = re.compile(r"[A-Z][a-z]*s")
# Words of that form that are no verbs, or that would begin the description of a value.
NO_VERBS = frozenset(
    "As Axes Bars Bytes Calls Columns Files Hosts Ids Indices Its Keys Less Logits Losses Messages Models Names "
    "Numbers Pairs Parameters Places Probabilities Prompts Queries Radians Responses Rows Seconds Settings "
    "Shapes Sizes Tensors Texts This Tokens Unless Values Versions Weights".split()
)
PROPERTIES = frozenset({"property", "cached_property"})


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yields the public functions of a module and the public methods of its public classes, properties excepted."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            if not PROPERTIES & {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}:
                yield prefix + node.name, node


def complaint(docstring: str | None) -> str | None:
    """Says what is wrong with the docstring of a public function, if anything."""
    if docstring is None:
        return "has none"
    summary = docstring.split("\n", 1)[0]
    first = summary.split(" ", 1)[0]
    if not VERB.fullmatch(first) or first in NO_VERBS:
        return f"begins with {first!r}, not with a verb in the third person"
    return None if summary.endswith(".") else f"the first line does not end with a full stop: {summary!r}"


# --- "a row a model" ------------------------------------------------------------------------------------------------

UNIT = (
    "answer|batch|block|byte|call|character|checkpoint|chip|chunk|column|compilation|conversation|core|day|device|"
    "document|element|epoch|example|file|GPU|group|head|host|hour|item|iteration|layer|line|machine|message|method|"
    "minute|model|node|number|page|pair|parameter|part|pass|place|position|process|program|prompt|question|response|"
    "row|run(?: directory)?|sample|second|section|seed|shape|shard|slice|slot|stage|step|task|template|token|TPU|"
    "verdict|weight|word|worker"
)
"""what something is counted or measured by"""
COUNT = (
    r"(?:\d[\d.,]*|N|one|two|three|four|five|six|seven|eight|nine|ten|twelve|hundreds|thousands|how many|how much|"
    r"how often|so many|as many|half|both|them|some|several|many|few|once|twice)"
)
MEASURED = (
    "GiB|MiB|KiB|GB|MB|TB|T?FLOPs?(?:/s)?|PFLOPs?|FLOP/s|bytes|bits|nats|radians|seconds|minutes|tokens|rows|pairs|"
    "responses|documents|comparisons|conversations|questions|prompts|batches|micro-batches|examples|words|characters|"
    "weights|numbers|devices|chips|cores|hosts|processes|iterations|epochs|logits|columns|norms|products|places|"
    "verdicts|templates|outlines|lines|files|gradients|memory|speed"
)
# Small words end a counted noun phrase: "one of a pair", "two that a model", "once when a run".
NOUN = (
    r"(?:(?!(?:an?|the|and|or|of|in|on|at|to|by|for|from|as|is|are|was|has|have|per|that|which|where|when|with|without|"
    r"within|into|over|under|behind|before|after|beside|between|than|not|no|if|while|until|because|so|but|about|like|"
    r"whose|what|how|be|makes?|gives?|takes?|holds?|needs?|reads?|writes?|says?|asks?|loads?|adapts?|uses?)\b)"
    r"[\w/-]+ )"
)
END = r"(?:[,.;:)]| (?:and|or|of|in|on|at|over|from|with|that|beside|for|too|as|but)\b|$| \||\*|\"|')"
PER = re.compile(
    # two matrix products a block; N responses a prompt; 2 a weight; them a chip; one p_generative a template
    rf"\b{COUNT} {NOUN}{{0,3}}an? (?:{UNIT})\b(?! time)(?={END})"
    # GiB a device; pairs a prompt; memory a device, GiB
    rf"|\b(?:{MEASURED}) an? (?:{UNIT})\b(?! time)(?={END})"
    # a row a model; a bar a stage; a sentence a file that lost rows
    rf"|\ban? {NOUN}{{1,2}}an? (?:{UNIT})\b(?! time)(?={END})",
    re.IGNORECASE,
)


def phrases(text: str) -> list[str]:
    """Returns what of a text, with its lines joined, is like "a row a model"."""
    return [match[0] for match in PER.finditer(re.sub(r"[*`_]*\s+[*`_]*", " ", text))]


def python_texts(source: str) -> Iterator[str]:
    """Yields the strings of a module, f-strings with a number in place of each value, and its blocks of comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "1" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    block, last = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != last + 1:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    yield " ".join(block)


def file_texts(path: Path) -> Iterator[str]:
    """Yields the strings and comments of a module, or the paragraphs and the lines of code of another file."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from python_texts(content)
        return
    for number, part in enumerate(re.split(r"^ *```", content, flags=re.MULTILINE)):
        # Every second part is a fenced block, whose lines are not sentences.
        yield from part.splitlines() if number % 2 else re.split(r"\n\s*\n", re.sub(r"(?m)^ *#+ ", "", part))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_docstrings_begin_with_a_verb_and_a_full_sentence(path):
    functions = public(ast.parse(path.read_text(encoding="utf-8")).body)
    found = {name: complaint(ast.get_docstring(node)) for name, node in functions}
    assert {name: why for name, why in found.items() if why} == {}


@pytest.mark.parametrize("path", [*MODULES, *TEXTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_units_are_joined_by_per(path):
    assert [phrase for text in file_texts(path) for phrase in phrases(text)] == []


@pytest.mark.parametrize(
    "docstring",
    [None, "", "The sum.", "returns the sum.", "Return the sum.", "Bytes of a type.", "As `rows`.", "Returns the sum",
     "Returns the sum of\nrows.", "[x y]."],
)  # fmt: skip
def test_complaint_about_a_docstring(docstring):
    assert complaint(docstring)


@pytest.mark.parametrize("docstring", ["Returns the sum.", "Checks rows.\n\nRaises:\n  InputError: one is bad"])
def test_no_complaint_about_a_docstring(docstring):
    assert complaint(docstring) is None


@pytest.mark.parametrize(
    "text",
    [
        "a row a model",
        "A row a file, at most 100 columns wide.",
        "One row a model, M1 after supervised fine-tuning",
        "A sentence a file that lost rows",
        "**A bar a stage**: SFT, evaluation",
        "pairs a prompt",
        "GiB a device",
        "memory a device, GiB, of 15.75",
        "needs ... GiB a device",
        "sample N responses a prompt",
        "N, responses a prompt",
        "tokens a second, model TFLOP/s a device",
        "documents a step",
        "16 pairs and 16 replayed judge questions a step.",
        "this is one of several processes, one a host",
        "decisions (one a pair)",
        "two cores a chip",
        "as many as make 64 MiB of float32 logits a device, at least 128",
        "five matrix products a block and not seven",
        "four norms a block",
        "Radians a position of each pair",
        "2 a weight and position forward",
        "16 bytes a parameter of weights",
        "one p_generative a template.",
        "one outline an iteration with its number",
        "for one position\n  a row, never",
        "chip.devices of them a chip",
        "compiled once a shape",
        "every pair once an epoch, the last batch",
        "sample 4 a prompt",
        "One comparison a prompt, chosen by the grader",
        "one process a run directory; the kernel frees the lock",
        "A function to one logit a pair in `rewards.py`",
        "one greedy response a prompt too",
    ],
)
def test_phrases_are_found(text):
    assert phrases(text)


@pytest.mark.parametrize(
    "text",
    [
        "one row per model",
        "GiB per device",
        "one chunk of the vocabulary, a layer at a time",
        "the vocabulary taken a chunk at a time",
        "steps in a row had a non-finite loss",
        "Returns one column of a row.",
        "the model answers a prompt and judges a pair.",
        "once a model is saved, its checkpoints go",
        "one of a pair",
        "which gives a model a second chance",
        "of a batch, a host of several makes its rows",
        "Reads the rows of a file, each a mapping.",
        "tokens of a row",
        "what a model a host holds",
    ],
)
def test_phrases_are_not_found(text):
    assert not phrases(text)
