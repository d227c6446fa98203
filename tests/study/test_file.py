"""Study files: those of the package, what they make of methods, and one sentence for each mistake."""

import copy

import pytest
import yaml

from scir_jax.config import cli
from scir_jax.config.checks import check, resolve
from scir_jax.config.files import BUNDLED, bundled_names, find_study, keys
from scir_jax.errors import InputError
from scir_jax.study.file import read_study

STUDIES = sorted(f"studies/{path.stem}" for path in (BUNDLED / "studies").glob("*.yaml"))
GOOD = {
    "base": ["quickstart", {"sample": {"prompts": 64}, "run.tensorboard": False}],
    "methods": {
        "srlm": "methods/srlm",
        "half": ["methods/scir", {"consistency.weight": 0.5, "sample": {"responses": 3}}],
    },
    "seeds": [0, 1],
    "iterations": 2,
    "longer": {"half": 5},
    "tuning": {"seeds": [100], "grid": {"optimise.learning_rate": [1e-4, "2e-4"]}, "extend": 1},
    "against": "srlm",
}


def write(tmp_path, change=None, text=None):
    content = copy.deepcopy(GOOD)
    if change:
        change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(text if text is not None else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", STUDIES)
def test_studies_of_the_package(name):
    """Every method's configuration passes the checks at every point, and says what its file says."""
    study = read_study(name)
    assert len(study.methods) >= 2 and name not in bundled_names()
    for method in study.methods.values():
        for point in method.points():
            config = method.at(point)
            check(resolve(config))
            for key, value in point:
                section, leaf = key.split(".")
                assert getattr(getattr(config, section), leaf) == value
    assert set(study.seeds).isdisjoint(study.tune_seeds)
    if name == "studies/methods":
        methods = {path.stem for path in (BUNDLED / "methods").glob("*.yaml")}
        # They need labels, or digits that the world's tokenizer has not; those of scir are another study's.
        others = {"external", "srlm_score"} | {name for name in methods if name.startswith("scir_")}
        assert set(study.methods) - {"scir_entropy"} == methods - others
        assert study.oracles == ("oracle",) and len(study.seeds) == 8


def test_what_a_file_says(tmp_path):
    study = read_study(write(tmp_path))
    half = study.methods["half"]
    line = ["--config", "quickstart", "--sample.prompts=64", "--run.tensorboard=false", "--config", "methods/scir"]
    whole = cli.parse("train", "", [*line, "--consistency.weight=0.5", "--sample.responses=3"])[0]
    assert half.config == whole
    assert half.points() == [(("optimise.learning_rate", 1e-4),), (("optimise.learning_rate", 2e-4),)]
    assert half.at(half.points()[1]).optimise.learning_rate == 2e-4
    assert (half.longer, study.methods["srlm"].longer) == (5, None)
    assert study.against == {"half": "srlm"} and study.oracles == () and (study.extend, study.jobs) == (1, 1)
    assert study.methods["srlm"].config.sample.prompts == 64


def test_the_command_line_wins(tmp_path):
    study = read_study(write(tmp_path), methods=["half"], against="half", seeds=[7], iterations=3, jobs=2)
    assert (list(study.methods), study.seeds, study.iterations, study.jobs) == (["half"], (7,), 3, 2)
    assert study.against == {"half": "half"}


def refused(tmp_path, change, **instead) -> str:
    path = write(tmp_path, change)
    with pytest.raises(InputError) as error:
        read_study(path, **instead)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(sedes=[1]), "unknown key 'sedes'; did you mean 'seeds'?"),
        (lambda c: c.pop("against"), "against is missing; a study says methods, seeds, iterations, against"),
        (lambda c: c.update(methods=["methods/scir"]), "methods must be a mapping of keys"),
        (lambda c: c["methods"].update(srlm="methods/srml"), "methods.srlm: methods/srml: no such file, and no conf"),
        (lambda c: c["methods"].update(srlm=3), "methods.srlm must be names of configurations and mappings of settings"),
        (lambda c: c["methods"].update({"a/b": {}}), "methods.a/b: a name is letters, digits"),
        (lambda c: c["methods"].update(half={"consistency": {"wieght": 1}}), "methods.half: unknown key "
            "consistency.wieght; did you mean 'consistency.weight'?"),
        (lambda c: c["methods"].update(half={"optimize": {"epochs": 1}}), "methods.half: unknown key optimize; did you "
            "mean '"),
        (lambda c: c["methods"].update(half={"optimise": {"epochs": "many"}}), "methods.half: "),
        (lambda c: c["methods"].update(half={"pairs": {"kind": "dice"}}), "methods.half at optimise.learning_rate=0.0001: "
            "preference.labels dice and pairs.kind dice belong together"),
        (lambda c: c["methods"].update(half={"run": {"seed": 3}}), "methods.half: run.seed is given by the study"),
        (lambda c: c["base"].append({"run.auto": True}), "base: run.auto proposes settings for each run anew"),
        (lambda c: c.update(against="scir"), "against: no method 'scir' takes part; there are srlm, half"),
        (lambda c: c.update(oracle="oracle"), "oracle: no method 'oracle' takes part"),
        (lambda c: c.update(longer={"scir": 9}), "longer: no method 'scir' takes part"),
        (lambda c: c.update(longer={"half": 2}), "longer.half must be a whole number of at least 3, not 2"),
        (lambda c: c.update(seeds=[]), "seeds must be a list of different seeds, as in [0, 1, 2], not []"),
        (lambda c: c.update(seeds=[1, 1]), "seeds must be a list of different seeds"),
        (lambda c: c.update(seeds=[1, 100]), "seeds and tuning.seeds share 100: the table would show what was tuned on"),
        (lambda c: c.update(iterations=0), "iterations must be a whole number of at least 1, not 0"),
        (lambda c: c.update(by="length"), "by is 'length'; it is a column of which more is better: quality, "),
        (lambda c: c["tuning"].update(gird={}), "unknown key 'tuning.gird'; did you mean 'grid'?"),
        (lambda c: c["tuning"].update(grid={}), "tuning.grid is empty or no lists"),
        (lambda c: c["tuning"].update(grid={"optimise.learning_rate": []}), "tuning.grid is empty or no lists"),
        (lambda c: c["tuning"].update(grid={"optimise.rate": [1]}), "tuning.grid: unknown key 'optimise.rate'; did you "
            "mean 'optimise."),
        (lambda c: c["tuning"].update(grid={"run.seed": [1]}), "tuning.grid: run.seed is given by the study"),
        (lambda c: c["tuning"].update(grid={"sample.top_k": [8, 8]}), "tuning.grid names a value twice"),
        (lambda c: c["tuning"].update(grid={"sample.top_k": ["few"]}), ""),
        (lambda c: c["tuning"].update(budget=3), "tuning: the grid of srlm makes 2 runs, and every method has 3"),
        (lambda c: c["tuning"].update(grids={"half": {"sample.top_k": [8]}}), "tuning: the grid of half makes 1 runs, and "
            "every method has 2; give it another one in tuning.grids.half"),
        (lambda c: c["tuning"].update(extend=True), "tuning.extend must be a whole number of at least 0, not True"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, change, words):
    assert refused(tmp_path, change).startswith(words)


def test_mistakes_of_the_command_line(tmp_path):
    assert refused(tmp_path, None, methods=["half", "scir"]).startswith("--methods: no method 'scir' takes part")
    assert refused(tmp_path, None, methods=["half"]).startswith("against: no method 'srlm' takes part; there are half")
    assert refused(tmp_path, None, seeds=[100]).startswith("seeds and tuning.seeds share 100")


def test_what_is_no_study(tmp_path):
    for text, words in (
        ("a: [", "not a YAML file"),
        ("- x", "a study must be a mapping"),
        ("", "a study must be a mapping"),
    ):
        path = write(tmp_path, text=text)
        with pytest.raises(InputError, match=f"{path}: {words}"):
            read_study(path)
    with pytest.raises(InputError, match="methods/scir: no such file, and no study of that name; there are studies/"):
        find_study("methods/scir")
    assert "consistency.weight" in keys(GOOD["methods"]["half"][1])
