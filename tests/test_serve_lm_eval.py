"""lm-evaluation-harness over HTTP: the scores are those of the same model in this process."""

from pathlib import Path
from typing import Any

import pytest

from dsmoe_jax.evaluate import task_data
from dsmoe_jax.generate import Generator
from tests.helpers.evaluation import CHOICES, COPY, write_tasks
from tests.helpers.serving import NEEDS_SERVE, running

pytest.importorskip("lm_eval", reason="evaluation needs the harness: pip install -e '.[eval]'")
pytest.importorskip("tenacity", reason="models of the harness over HTTP need tenacity")
import lm_eval  # pyright: ignore[reportMissingImports]
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # pyright: ignore
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from dsmoe_jax.evaluate.harness import DSMoELM

pytestmark = [NEEDS_SERVE, pytest.mark.heavy]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of datasets and aiohttp
def test_scores_over_http_equal_those_in_process(generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets.config  # pyright: ignore[reportMissingImports]

    tasks, data = write_tasks(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    tokenizer, ours = generator.tokenizer, DSMoELM(generator)
    assert tokenizer is not None

    run: Any = lm_eval.simple_evaluate
    completions: Any = LocalCompletionsAPI
    chats: Any = LocalChatCompletion

    def results(lm: Any, names: list[str], **options: Any) -> Any:
        found = run(lm, tasks=names, task_manager=manager, bootstrap_iters=0, limit=3, **options)
        responses = {name: [one["resps"] for one in found["samples"][name]] for name in names}
        return found["results"], responses

    with task_data.local_datasets(data), running(generator) as server:
        options: dict[str, Any] = {"model": "small", "num_concurrent": 5, "max_retries": 1}
        lm = completions(f"{server.url}/v1/completions", **options)
        assert (lm.tokenizer_backend, lm.eos_string) == ("remote", tokenizer.eos_token)
        # With BOS, as `tokenizer_backend=huggingface,add_bos_token=True`, which needs transformers.
        monkeypatch.setattr(lm.tokenizer, "encode", tokenizer.encode)

        (scores, found), (expected, theirs) = results(lm, [CHOICES, COPY]), results(ours, [CHOICES, COPY])

        assert scores == expected
        assert found[COPY] == theirs[COPY]
        pairs = [[choice[0] for choice in each] for responses in (found, theirs) for each in responses[CHOICES]]
        half = len(pairs) // 2
        for one, other in zip(pairs[:half], pairs[half:], strict=True):
            assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
            assert [logprob for logprob, _ in one] == pytest.approx([logprob for logprob, _ in other], abs=1e-4)

        chat = chats(f"{server.url}/v1/chat/completions", **options)
        over_http, in_process = (results(lm, [COPY], apply_chat_template=True) for lm in (chat, ours))
        assert over_http == in_process
