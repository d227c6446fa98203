"""The model card of an exported model: README.md with the front matter that the Hugging Face hub reads.

It names files and directories by their last part alone: a card is read by others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from scir_jax.config.files import to_dict
from scir_jax.config.schema import Config
from scir_jax.data.jsonl import read_json
from scir_jax.run import hub
from scir_jax.run.columns import COLUMNS, MODEL, cells
from scir_jax.run.directory import RunDirectory

CARD = "README.md"
TAG = "scir_jax"
# Where a run computes and keeps its files, and what other parts of the card say.
ELSEWHERE: tuple[str, ...] = ("run.directory", "run.start_from", "run.distributed", "run.host_timeout")
ELSEWHERE += ("run.compilation_cache", "run.tensorboard", "run.wandb", "world.directory", "model.path")
ELSEWHERE += ("lora.adapter", "sample.command")


def write_card(directory: Path, config: Config, run: RunDirectory, number: int, name: str | None = None) -> None:
    """Writes the card of M_number into the directory that it was exported to; a README.md of the user's stays.

    Args:
      directory: holds a model, or adapters.
      name: what the model is called, OWNER/NAME of the hub; by default the directory in the one around it.
    """
    path = directory / CARD
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    text = card(
        config, run, number, name or f"./{directory.name}", adapter=(directory / "adapter_config.json").exists()
    )
    if before == text or (before and f"\n- {TAG}\n" not in before):
        return
    partial = path.with_name(CARD + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def card(config: Config, run: RunDirectory, number: int, name: str, *, adapter: bool) -> str:
    """Returns the card of M_number of a run as a text.

    Args:
      name: what stands where the model is loaded.
      adapter: it is an adapter, and not a whole model.
    """
    manifest = read_json(run.path / "manifest.json")
    base, commit = _base(config, manifest)
    parts = [
        f"---\n{yaml.safe_dump(_front(config, base, adapter), sort_keys=False)}---\n",
        f"# {f'M{number} from {base}' if name.startswith('.') else name.rpartition('/')[2]}",
        f"M{number} of a run of scir_jax ([Self-Consistent Internal Rewards](https://arxiv.org/abs/2502.08922)), "
        f"{'adapters for' if adapter else 'trained from'} the base model `{base}`{f' at {commit}' if commit else ''}.",
        f"## Method\n\n{_method(config)}",
        f"## Models of the run\n\n{_models(run, number)}",
        f"## Data\n\n{_data(config, run, manifest)}",
        f"## Settings\n\nThose that differ from the defaults:\n\n```yaml\n{_settings(config)}```",
        f"## Loading it\n\n{_loading(name, base, adapter)}",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _base(config: Config, manifest: dict[str, Any]) -> tuple[str, str | None]:
    """Returns the base model's name and, where it is the hub's, its commit."""
    found = manifest.get("hub", {}).get("model.path")
    if found:
        return found["name"].partition("@")[0], found["commit"]
    return Path(config.model.path).name, None


def _front(config: Config, base: str, adapter: bool) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    # The hub takes names of its own alone.
    if "/" in base:
        front |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    sources = [value for value in _sources(config).values() if "/" in value and not Path(value).exists()]
    names = dict.fromkeys(source.partition(":")[0] for source in sources if source.count("/") == 1)
    kept = [name for name in names if hub.NAME.fullmatch(name) and not name.endswith((".jsonl", ".json", ".parquet"))]
    return front | ({"datasets": kept} if kept else {}) | {"tags": [TAG, "scir", "dpo", "arxiv:2502.08922"]}


def _sources(config: Config) -> dict[str, str]:
    return {
        key: value for key, value in to_dict(config)["data"].items() if isinstance(value, str) and "_row" not in key
    }


def _method(config: Config) -> str:
    consistency, selection, preference = config.consistency, config.selection, config.preference
    said = config.pairs.scorer and _last(config.pairs.scorer)
    rows = {
        "reward models": ", ".join(config.rewards.models),
        "judge templates": ", ".join(map(_last, config.generative.templates)),
        "labels": f"{preference.labels}{f' ({said})' if said else ''}, {preference.update}",
        "pairs": f"{config.pairs.kind}, of {config.sample.responses} answers per prompt",
        "selection": selection.rule,
        "consistency": f"{consistency.kind}, weight {consistency.weight:g}" if consistency.weight else "none",
        "preference loss": f"{preference.loss}, beta {preference.beta:g}, reference {_last(preference.reference)}",
        "implicit reward": f"beta {config.implicit.beta:g}, reference {_last(config.implicit.reference)}",
        "iterations": str(config.run.iterations),
        "trained": f"adapters of rank {config.lora.rank}" if config.lora.rank or config.lora.adapter else "all weights",
    }
    return _table(("part", "setting"), rows.items())


def _models(run: RunDirectory, number: int) -> str:
    files = sorted(run.path.glob("iteration_*/evaluation.json"))
    rows = [row for row in map(read_json, files) if row.get("model")]
    columns = [c for c in COLUMNS if c.key != "seconds" and any(row.get(c.key) is not None for row in rows)]
    if not columns:
        return "No model of the run was evaluated."
    shown = (MODEL, *columns)
    table = _table([column.title for column in shown], [cells(row, shown) for row in rows])
    return (
        f"{table}\n\nThis is M{number}; M1 is the model after supervised fine-tuning. GRM and IRM acc. are the "
        "accuracies of the model as a judge and of its implicit reward on held-out labelled pairs. Agreement alone is "
        "no success."
    )


def _data(config: Config, run: RunDirectory, manifest: dict[str, Any]) -> str:
    hashes = manifest["sha256"]
    path = run.path / "data.json"
    files = read_json(path)["files"] if path.exists() else {}
    rows = [
        (f"data.{key}", _last(source), str(files.get(key, {}).get("used", "-")), f"`{hashes.get(f'data.{key}', '-')}`")
        for key, source in _sources(config).items()
        if f"data.{key}" in hashes
    ]
    rows += [
        (key.partition("/")[0], key.partition("/")[2], "-", f"`{value}`")
        for key, value in hashes.items()
        if key.endswith(".safetensors")
    ]
    return _table(("key", "file", "rows", "SHA-256"), rows)


def _settings(config: Config) -> str:
    ours, default = to_dict(config), to_dict(Config())
    found: dict[str, dict[str, Any]] = {}
    for section in (name for name in ours if name != "mesh"):
        for key, value in ours[section].items():
            path = section == "data" and isinstance(value, str) and key in _sources(config)
            if value != default[section][key] and f"{section}.{key}" not in ELSEWHERE and not path:
                found.setdefault(section, {})[key] = _shown(section, key, value)
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _shown(section: str, key: str, value: Any) -> Any:
    if (section, key) == ("generative", "templates"):
        return [_last(name) for name in value]
    return _last(value) if key == "reference" or (section, key) == ("pairs", "scorer") else value


def _last(name: str) -> str:
    """Returns a name of the hub, of a template or of a function as it is, and a path's last part."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() or name.count("/") > 1 else name


def _loading(name: str, base: str, adapter: bool) -> str:
    if adapter:
        python = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
        )
        option = f"--model.path {base} --lora.adapter {name}"
    else:
        python = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        )
        option = f"--model.path {name}"
    command = f"python -m scir_jax.sample {option} --data.prompts prompts.jsonl --output answers.jsonl"
    return f"```python\n{python}```\n\nor, answering a file of prompts with scir_jax,\n\n```sh\n{command}\n```"


def _table(titles: Any, rows: Any) -> str:
    lines = [list(titles), ["---"] * len(list(titles)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
