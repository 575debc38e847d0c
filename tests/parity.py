"""`python -m tests.parity` prints the README's table: how far every golden case is from the original PyTorch model."""

import unittest

import numpy as np

from dsmoe_jax.generate import Generator
from tests.helpers import golden

COLUMNS = (
    "case",
    "logits",
    "hidden states",
    "experts chosen",
    "router weights",
    "greedy answers",
    "bf16 rms (original's)",
    "bf16 argmax",
)


def row(case: str) -> str:
    """One line of the table."""
    want, expected = golden.tensors(case), golden.expected(case)
    model = golden.model(case)
    out = model(want["in.input_ids"], output_hidden_states=True)
    logits = np.abs(out.logits - want["logits"]).max()
    hidden = max(np.abs(h - want[f"hidden.{i}"]).max() for i, h in enumerate(out.hidden_states or ()))
    same_sets = all(
        np.array_equal(np.sort(r.ids.reshape(-1, r.ids.shape[-1])), np.sort(want[f"router.{layer}.topk_idx"]))
        for layer, r in out.routing.items()
    )
    weights = max(
        np.abs(np.asarray(r.weights).reshape(-1, r.weights.shape[-1]) - want[f"router.{layer}.topk_weight"]).max()
        for layer, r in out.routing.items()
    )
    ids = expected["generation"]
    prompts = [want[f"in.gen.prompt{i}"][0] for i in range(3)]
    answers = Generator(model)(prompts, max_new_tokens=len(ids["prompt0"]), ignore_eos=True)
    right = sum(answer.token_ids == theirs for answer, theirs in zip(answers, ids["leftpad_batch"], strict=True))
    bf16 = np.asarray(golden.model(case, "bfloat16")(want["in.input_ids"]).logits)
    rms = np.sqrt(np.mean((bf16 - want["logits"]) ** 2))
    agree = np.mean(bf16.argmax(-1) == want["logits"].argmax(-1))
    return (
        f"| `{case}` | {logits:.1e} | {hidden:.1e} | {'equal' if same_sets else 'DIFFER'} | {weights:.1e} "
        f"| {right} of {len(prompts)} | {rms:.3f} ({expected['bf16_vs_fp32_logits_rms']:.3f}) | {agree:.3f} |"
    )


def main() -> None:
    """Print the table of every case that is here."""
    print(f"| {' | '.join(COLUMNS)} |")
    print("| --- " * len(COLUMNS) + "|")
    for case in golden.CASES:
        try:
            print(row(case))
        except unittest.SkipTest as absent:
            print(f"| `{case}` | {absent} |")


if __name__ == "__main__":
    main()
