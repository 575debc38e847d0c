"""What an experiment runs, written before it runs: `Experiment`."""

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.experiments.comparisons import COMPARISONS, Comparison
from dsmoe_jax.experiments.variants import MAIN, SCALES, Scale, choose, model_config, run_config, settings, shortened
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.data import PYTHON_STDLIB, TokenShards, is_token_shards
from dsmoe_jax.train.data.shards import MANIFEST

_PLAN: Final = "plan.json"
_DATA: Final = "data"
_RESULTS: Final = "results"
_RUNS: Final = "runs"
_ABLATIONS: Final = "ablations"
_TOKENIZER: Final = "tokenizer"
_MODELS: Final = "models"
_OWN: Final = (_DATA, _TOKENIZER, _MODELS, _RUNS, _RESULTS, _ABLATIONS)
_DEFAULTS: Final = {
    "scale": "laptop",
    "variants": MAIN,
    "seeds": 3,
    "sources": (PYTHON_STDLIB,),
    "ablation_tokens": 65_536,
}


class Job(NamedTuple):
    """A training run."""

    variant: str
    seed: int

    def __str__(self) -> str:
        """Name of its folder."""
        return f"{self.variant}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The runs of an experiment in its folder.

    Attributes:
        out: The folder.
        scale_name: A key of `SCALES`.
        scale: Its sizes, with the requested number of steps.
        variants: Keys of `VARIANTS`.
        seeds: Number of seeds, from 0; runs of equal seed are paired.
        sources: Texts.
        ablation_tokens: Validation tokens of the ablations.
        first: Variants, seeds and comparisons of the first plan, which was written before any run.
        data_sha256: Hash of the manifest of the tokenized texts; None before they are.
    """

    out: Path
    scale_name: str
    scale: Scale
    variants: tuple[str, ...]
    seeds: int
    sources: tuple[str, ...]
    ablation_tokens: int
    first: Mapping[str, Any]
    data_sha256: str | None = None

    @classmethod
    def create(
        cls,
        out: Path,
        *,
        scale: str | None = None,
        variants: Sequence[str] | None = None,
        seeds: int | None = None,
        steps: int | None = None,
        sources: Sequence[str] | None = None,
        ablation_tokens: int | None = None,
    ) -> "Experiment":
        """Check the arguments against each other and the plan in the folder; see `reproduce`."""
        if (before := _read_plan(out)) is None and (foreign := [name for name in _OWN if (out / name).exists()]):
            raise DSMoEError(f"{out} has a {foreign[0]}, but no {_PLAN}; choose another --out")
        defaults: Mapping[str, Any] = before or _DEFAULTS
        numbers = {"seeds": (seeds, 1), "steps": (steps, 1), "ablation_tokens": (ablation_tokens, 2)}
        for name, (value, least) in numbers.items():
            if value is not None and (type(value) is not int or value < least):
                raise DSMoEError(f"{name} must be an integer of at least {least}, got {value!r}")
        scale_name: str = defaults["scale"] if scale is None else scale
        check_choice("scale", scale_name, SCALES)
        sizes = SCALES[scale_name]
        if steps is not None or before:
            sizes = shortened(sizes, defaults["settings"]["steps"] if steps is None else steps)
        sources = tuple(defaults["sources"] if sources is None else sources)
        if len(sources) > 1 and any(map(is_token_shards, sources)):
            raise DSMoEError("sources must be texts, or one folder of token shards")
        known = before["variants"] if before else ()
        chosen = choose(defaults["variants"] if variants is None else variants)
        new = cls(
            out=out,
            scale_name=scale_name,
            scale=sizes,
            variants=tuple(dict.fromkeys((*known, *chosen))),
            seeds=max(seeds or defaults["seeds"], before["seeds"] if before else 1),
            sources=sources,
            ablation_tokens=ablation_tokens or defaults["ablation_tokens"],
            first={},
        )
        if before is None:
            comparisons = [one._asdict() for one in COMPARISONS]
            first = {"variants": list(new.variants), "seeds": new.seeds, "comparisons": comparisons}
            return dataclasses.replace(new, first=first)
        new._check_unchanged(before)
        first = before.get("first") or {name: before[name] for name in ("variants", "seeds", "comparisons")}
        read = before.get("data_sha256") if sources == tuple(before["sources"]) else None
        return dataclasses.replace(new, first=first, data_sha256=read)

    def _check_unchanged(self, before: Mapping[str, Any]) -> None:
        """Raise if anything but variants and seeds differs from the plan, and was used."""
        used = {
            "scale": True,
            "sources": (self.out / _RUNS).exists(),
            "ablation_tokens": (self.out / _ABLATIONS).exists(),
        }
        now = self.fields()
        pairs = {name: (before.get(name), now[name]) for name, in_use in used.items() if in_use}
        earlier = _completed(before["settings"], settings(SCALES[self.scale_name]))
        pairs |= {name: (earlier[name], value) for name, value in now["settings"].items()}
        for name, (old, value) in pairs.items():
            if old != value:
                changed = f"{name} {old} -> {value}"
                raise DSMoEError(f"{self.out} is another experiment: {changed:.200}; choose another --out")

    @classmethod
    def read(cls, out: Path) -> "Experiment":
        """Read the plan in a folder."""
        if not (out / _PLAN).exists():
            raise DSMoEError(f"{out} is no experiment: it has no {_PLAN}")
        return cls.create(out)

    @property
    def given_shards(self) -> bool:
        """Whether the source is a folder of token shards, instead of texts."""
        return is_token_shards(self.sources[0])

    @property
    def data(self) -> Path:
        """Token shards of the texts, or those given."""
        return user_path(self.sources[0], "sources") if self.given_shards else self.out / _DATA

    @property
    def jobs(self) -> list[Job]:
        """All runs, seed by seed, so that what is complete is comparable."""
        return [Job(variant, seed) for seed in range(self.seeds) for variant in self.variants]

    def write(self) -> None:
        """Write plan and models; other sources than before replace what was made of those."""
        before = _read_plan(self.out)
        if before and before["sources"] != list(self.sources):
            self.discard_data()
        write_json(self.out / _PLAN, self.fields())
        (self.out / _MODELS).mkdir(exist_ok=True)
        for variant in self.variants:
            write_json(self.model(variant), model_config(variant, self.scale).to_dict())

    def discard_data(self) -> None:
        """Delete tokenizer and token shards that were made of the texts."""
        for folder in (self.out / _DATA, self.tokenizer):
            if folder.exists():
                shutil.rmtree(folder)

    def bind_data(self) -> "Experiment":
        """Record the hash of the tokenized texts, or check that it is the same as at earlier starts."""
        found = hashlib.sha256((self.data / MANIFEST).read_bytes()).hexdigest()
        if self.data_sha256 not in (None, found):
            raise DSMoEError(f"{self.out} is another experiment: {self.data} has changed; choose another --out")
        bound = dataclasses.replace(self, data_sha256=found)
        write_json(self.out / _PLAN, bound.fields())
        return bound

    def fields(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {
            "scale": self.scale_name,
            "settings": settings(self.scale),
            "sources": list(self.sources),
            "ablation_tokens": self.ablation_tokens,
            "variants": list(self.variants),
            "seeds": self.seeds,
            "first": dict(self.first),
            "data_sha256": self.data_sha256,
        }

    def decided(self, one: Comparison) -> bool:
        """Whether a comparison and its variants are in the first plan."""
        key = lambda found: tuple(found.get(name, 0) for name in ("better", "worse", "equal", "disabled"))  # noqa: E731
        planned = {one.better, one.worse} <= set(self.first["variants"])
        return planned and key(one._asdict()) in map(key, self.first["comparisons"])

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.out / _TOKENIZER

    def model(self, variant: str) -> Path:
        """Return the path of a variant's `config.json`."""
        return self.out / _MODELS / f"{variant}.json"

    def run_folder(self, job: Job) -> Path:
        """Return the output folder of a run."""
        return self.out / _RUNS / str(job)

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return the result of a run; None before it is complete."""
        return _read(self.out / _RESULTS / f"{job}.json", "eval_loss")

    def ablations(self, job: Job) -> dict[str, Any] | None:
        """Return the ablations of a trained model; None before they are measured."""
        return _read(self.ablation_file(job), "losses", "tokens", "documents")

    def write_result(self, job: Job, fields: Mapping[str, Any]) -> None:
        """Write the result of a complete run."""
        (self.out / _RESULTS).mkdir(exist_ok=True)
        write_json(self.out / _RESULTS / f"{job}.json", {"variant": job.variant, "seed": job.seed, **fields})

    def ablation_file(self, job: Job) -> Path:
        """Return the path of the ablations of a trained model."""
        return self.out / _ABLATIONS / f"{job}.json"

    def run_config(self, job: Job) -> RunConfig:
        """Return the config of a run."""
        validation = TokenShards.open(self.data, "validation", verify=False)
        batches = -(-(validation.tokens + len(validation)) // self.scale.tokens_per_step) + 1
        paths = {"model": self.model(job.variant), "data": self.data, "out": self.run_folder(job)}
        return run_config(self.scale, job.seed, eval_batches=batches, **paths)


def _read_plan(out: Path) -> dict[str, Any] | None:
    """Return the plan in a folder; None if there is none."""
    if (found := _read(out / _PLAN, *_DEFAULTS, "settings")) is None:
        return None
    types = {name: list if isinstance(value, tuple) else type(value) for name, value in _DEFAULTS.items()}
    for name, expected in {**types, "settings": dict}.items():
        if type(found[name]) is not expected:
            raise DSMoEError(f"{out / _PLAN}: damaged: {name} is {found[name]!r:.80}")
    if type(found["settings"].get("steps")) is not int:
        raise DSMoEError(f"{out / _PLAN}: damaged: settings have no steps")
    choose(found["variants"])
    first = found.get("first") or found
    if missing := [name for name in ("variants", "seeds", "comparisons") if name not in first]:
        raise DSMoEError(f"{out / _PLAN}: damaged: the first plan has no {missing[0]}")
    return found


def _completed(found: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the defaults of fields that did not exist when they were written."""
    nested = {
        name: _completed(value, defaults[name])
        for name, value in found.items()
        if isinstance(value, dict) and isinstance(defaults.get(name), dict)
    }
    return {**defaults, **found, **nested}


def _read(path: Path, *needed: str) -> dict[str, Any] | None:
    """Return a JSON object; None if there is no file."""
    if not path.exists():
        return None
    found = read_json(path)
    if missing := [name for name in needed if not isinstance(found, dict) or name not in found]:
        raise DSMoEError(f"{path}: damaged: it has no {missing[0]}")
    return found
