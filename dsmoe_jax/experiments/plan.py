"""What an experiment runs, written before it runs: `Experiment`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError, check_choice
from dsmoe_jax.experiments.comparisons import COMPARISONS
from dsmoe_jax.experiments.variants import SCALES, Scale, choose, model_config, run_config, settings, shortened
from dsmoe_jax.storage.atomic_dir import write_json
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.train.config import RunConfig
from dsmoe_jax.train.data import TokenShards, is_token_shards

_PLAN: Final = "plan.json"
_DATA: Final = "data"
_RESULTS: Final = "results"


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
    """

    out: Path
    scale_name: str
    scale: Scale
    variants: tuple[str, ...]
    seeds: int
    sources: tuple[str, ...]
    ablation_tokens: int

    @classmethod
    def create(
        cls,
        out: Path,
        *,
        scale: str,
        variants: Sequence[str],
        seeds: int,
        steps: int | None,
        sources: Sequence[str],
        ablation_tokens: int,
    ) -> "Experiment":
        """Check the arguments; see `reproduce`."""
        check_choice("scale", scale, SCALES)
        for name, value in (("seeds", seeds), ("steps", 1 if steps is None else steps)):
            if value < 1:
                raise DSMoEError(f"{name} must be at least 1, got {value}")
        sizes = SCALES[scale] if steps is None else shortened(SCALES[scale], steps)
        if len(sources) > 1 and any(map(is_token_shards, sources)):
            raise DSMoEError("sources must be texts, or one folder of token shards")
        return cls(out, scale, sizes, choose(variants), seeds, tuple(sources), ablation_tokens)

    @classmethod
    def read(cls, out: Path) -> "Experiment":
        """Read the plan in a folder."""
        fields = read_json(out / _PLAN)
        names = ("scale", "variants", "seeds", "sources", "ablation_tokens")
        return cls.create(out, steps=fields["settings"]["steps"], **{name: fields[name] for name in names})

    @property
    def data(self) -> Path:
        """Token shards of the texts, or those given."""
        return Path(self.sources[0]) if is_token_shards(self.sources[0]) else self.out / _DATA

    @property
    def jobs(self) -> list[Job]:
        """All runs, seed by seed, so that what is complete is comparable."""
        return [Job(variant, seed) for seed in range(self.seeds) for variant in self.variants]

    def write(self) -> None:
        """Write plan and models; variants and seeds may be added to an existing plan, nothing else may change."""
        path, fields = self.out / _PLAN, self.fields()
        if path.exists():
            before = read_json(path)
            for name in ("scale", "settings", "sources", "ablation_tokens"):
                if before.get(name) != fields[name]:
                    changed = f"{name} {before.get(name)} -> {fields[name]}"
                    raise DSMoEError(f"{self.out} is another experiment: {changed:.200}; choose another --out")
        write_json(path, fields)
        (self.out / "models").mkdir(exist_ok=True)
        for variant in self.variants:
            write_json(self.model(variant), model_config(variant, self.scale).to_dict())

    def fields(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {
            "scale": self.scale_name,
            "settings": settings(self.scale),
            "sources": list(self.sources),
            "ablation_tokens": self.ablation_tokens,
            "variants": list(self.variants),
            "seeds": self.seeds,
            "comparisons": [one._asdict() for one in COMPARISONS],
        }

    def model(self, variant: str) -> Path:
        """Return the path of a variant's `config.json`."""
        return self.out / "models" / f"{variant}.json"

    def run_folder(self, job: Job) -> Path:
        """Return the output folder of a run."""
        return self.out / "runs" / str(job)

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return the result of a run; None before it is complete."""
        path = self.out / _RESULTS / f"{job}.json"
        return read_json(path) if path.exists() else None

    def write_result(self, job: Job, fields: Mapping[str, Any]) -> None:
        """Write the result of a complete run."""
        (self.out / _RESULTS).mkdir(exist_ok=True)
        write_json(self.out / _RESULTS / f"{job}.json", {"variant": job.variant, "seed": job.seed, **fields})

    def ablation_file(self, job: Job) -> Path:
        """Return the path of the ablations of a trained model."""
        return self.out / "ablations" / f"{job}.json"

    def run_config(self, job: Job) -> RunConfig:
        """Return the config of a run."""
        validation = TokenShards.open(self.data, "validation", verify=False)
        batches = -(-(validation.tokens + len(validation)) // self.scale.tokens_per_step) + 1
        paths = {"model": self.model(job.variant), "data": self.data, "out": self.run_folder(job)}
        return run_config(self.scale, job.seed, eval_batches=batches, **paths)
