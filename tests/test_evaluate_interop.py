"""Results of `DSMoELM` equal those of the harness's own `hf` model over the exported PyTorch code."""

import sys
from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.convert import export_hf
from dsmoe_jax.evaluate import task_data
from dsmoe_jax.generate import Generator
from dsmoe_jax.text.chat_template import DEEPSEEK_TEMPLATE
from tests.helpers.evaluation import CHOICES, COPY, TASKS, TEXTS, write_tasks

pytest.importorskip("lm_eval", reason="evaluation needs the harness: pip install -e '.[eval]'")
pytest.importorskip("torch", reason="the reader is PyTorch: pip install -e '.[interop]'")
pytest.importorskip("transformers", reason="the reader is transformers: pip install -e '.[interop]'")
import lm_eval  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from dsmoe_jax.evaluate.harness import DSMoELM

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers

WINDOW = 24  # shorter than some prompts
LOGPROBS = 1e-3  # of a sum of up to 80


@pytest.fixture(scope="module", params=["whole", "truncated", "chat"])
def results(
    request: pytest.FixtureRequest, checkpoint: Path, generator: Generator, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of `DSMoELM` and `hf` on the same tasks."""
    import datasets.config  # pyright: ignore[reportMissingImports]

    home = tmp_path_factory.mktemp("hf")
    tasks, data = write_tasks(home)
    exported = export_hf(checkpoint, home / "exported", with_modeling=True).path
    (exported / "chat_template.jinja").write_text(DEEPSEEK_TEMPLATE)  # the default of our tokenizer
    length = WINDOW if request.param == "truncated" else 2048
    options: dict[str, Any] = {
        "tasks": list(TASKS),
        "task_manager": TaskManager(include_defaults=False, include_path=str(tasks)),
        "apply_chat_template": request.param == "chat",
    }
    hf = {"pretrained": str(exported), "trust_remote_code": True, "dtype": "float32", "max_length": length}
    run: Any = lm_eval.simple_evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        patch.setattr(sys, "path", [*sys.path])
        for module in ("transformers.utils.hub", "transformers.dynamic_module_utils"):
            patch.setattr(f"{module}.HF_MODULES_CACHE", str(home / "modules"))
        with task_data.local_datasets(data):
            ours = run(model=DSMoELM(generator, max_length=length), **options)
            theirs = run(model="hf", model_args=hf, device="cpu", batch_size=1, **options)
    return ours, theirs


def responses(results: dict[str, Any], task: str) -> list[Any]:
    return [one[0] for sample in results["samples"][task] for one in sample["resps"]]


def test_multiple_choice_equals_hf(results: tuple[dict[str, Any], dict[str, Any]]):
    ours, theirs = (responses(one, CHOICES) for one in results)

    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=LOGPROBS)


def test_generation_equals_hf(results: tuple[dict[str, Any], dict[str, Any]]):
    ours, theirs = (responses(one, COPY) for one in results)

    assert ours == theirs


def test_rolling_equals_hf(results: tuple[dict[str, Any], dict[str, Any]]):
    ours, theirs = (responses(one, TEXTS) for one in results)

    assert ours == pytest.approx(theirs, abs=LOGPROBS)


def test_scores_equal_hf(results: tuple[dict[str, Any], dict[str, Any]]):
    ours, theirs = (one["results"] for one in results)

    for task in TASKS:
        numbers = {name: value for name, value in ours[task].items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: theirs[task][name] for name in numbers}, rel=1e-5)
