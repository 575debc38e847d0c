"""Suites: the benchmarks of the DeepSeekMoE paper as tasks of lm-evaluation-harness, with the published scores.

The published scores (arXiv:2401.06066, tables 3 to 5) come from an internal framework whose prompts are not published,
so a task here has the paper's shots and metric, not its prompts. LLaMA2 7B calibrates the difference: anyone can
evaluate it with the same tasks. Read `BASE` first; `SUITES` lists them all.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple


class Row(NamedTuple):
    """A benchmark: a line of the report.

    Attributes:
        benchmark: Name in the paper.
        task: Task or group of the harness, or of `tasks/`.
        shots: Examples in the context; None: those of the task.
        metric: Metric and filter, as in the harness's results; "": every metric of the task.
        published: Scores by model, in the order of `Suite.models`; None where there is none.
    """

    benchmark: str
    task: str
    shots: int | None
    metric: str
    published: tuple[float | None, ...] = ()


class Suite(NamedTuple):
    """Benchmarks and the models whose scores are published.

    Attributes:
        models: The evaluated model first, then those to calibrate by.
        rows: The benchmarks.
        is_list: Whether they are tasks given by name, all of which must run.
    """

    models: tuple[str, ...]
    rows: tuple[Row, ...]
    is_list: bool = False


# How a task differs from what is known of the paper's, or which of several customs it follows.
NOTES: Final = {
    "pile_10k": "first 10,000 documents of the training set; published: the test set",
    "hellaswag": "log-likelihood of the options per byte",
    "arc_easy": "log-likelihood of the options per byte",
    "arc_challenge": "log-likelihood of the options per byte",
    "dsmoe_race_middle": "log-likelihood of the options; examples from the training set",
    "dsmoe_race_high": "log-likelihood of the options; examples from the training set",
    "gsm8k_cot": "eight fixed chain-of-thought examples",
    "gsm8k_cot_zeroshot": "the last number of the output",
    "minerva_math": "four fixed examples; answers compared by sympy",
    "dsmoe_cluewsc": "validation set; generates yes or no",
    "ceval-valid": "validation set",
    "dsmoe_chid": "validation set; log-likelihood of the text after each of ten idioms",
}

# fmt: off
BASE: Final = Suite(("DeepSeekMoE 16B", "LLaMA2 7B", "DeepSeek 7B"), (
    #    benchmark           task                shots  metric                           MoE 16B  LLaMA2  DeepSeek
    Row("Pile",             "pile_10k",          0,    "bits_per_byte,none",            (0.74,    0.76,   0.75)),
    Row("HellaSwag",        "hellaswag",         0,    "acc_norm,none",                 (77.1,    75.6,   75.4)),
    Row("PIQA",             "piqa",              0,    "acc,none",                      (80.2,    78.0,   79.2)),
    Row("ARC-easy",         "arc_easy",          0,    "acc_norm,none",                 (68.1,    69.1,   67.9)),
    Row("ARC-challenge",    "arc_challenge",     0,    "acc_norm,none",                 (49.8,    49.0,   48.1)),
    Row("RACE-middle",      "dsmoe_race_middle", 5,    "acc,none",                      (61.9,    60.7,   63.2)),
    Row("RACE-high",        "dsmoe_race_high",   5,    "acc,none",                      (46.4,    45.8,   46.5)),
    Row("DROP",             "drop",              1,    "em,none",                       (32.9,    34.0,   34.9)),
    Row("GSM8K",            "gsm8k_cot",         8,    "exact_match,strict-match",      (18.8,    15.5,   17.4)),
    Row("MATH",             "minerva_math",      4,    "exact_match,none",              (4.3,     2.6,    3.3)),
    Row("HumanEval",        "humaneval",         0,    "pass@1,create_test",            (26.8,    14.6,   26.2)),
    Row("MBPP",             "mbpp",              3,    "pass_at_1,none",                (39.2,    21.8,   39.0)),
    Row("TriviaQA",         "triviaqa",          5,    "exact_match,remove_whitespace", (64.8,    63.8,   59.7)),
    Row("NaturalQuestions", "nq_open",           5,    "exact_match,remove_whitespace", (25.5,    25.5,   22.2)),
    Row("MMLU",             "mmlu",              5,    "acc,none",                      (45.0,    45.8,   48.2)),
    Row("WinoGrande",       "winogrande",        0,    "acc,none",                      (70.2,    69.6,   70.5)),
    Row("CLUEWSC",          "dsmoe_cluewsc",     5,    "exact_match,none",              (72.1,    64.0,   73.1)),
    Row("C-Eval",           "ceval-valid",       5,    "acc,none",                      (40.6,    33.9,   45.0)),
    Row("CMMLU",            "cmmlu",             5,    "acc,none",                      (42.5,    32.6,   47.2)),
    Row("CHID",             "dsmoe_chid",        0,    "acc,none",                      (89.4,    37.9,   89.3)),
))

# LLaMA2 SFT 7B and DeepSeek Chat 7B were fine-tuned on the same internal data; neither calibrates the prompts.
CHAT: Final = Suite(("DeepSeekMoE Chat 16B", "LLaMA2 SFT 7B", "DeepSeek Chat 7B"), (
    #    benchmark           task                 shots  metric                           MoE 16B  LLaMA2  DeepSeek
    Row("HellaSwag",        "hellaswag",          0,    "acc_norm,none",                 (72.2,    67.9,   71.0)),
    Row("PIQA",             "piqa",               0,    "acc,none",                      (79.7,    76.9,   78.4)),
    Row("ARC-easy",         "arc_easy",           0,    "acc_norm,none",                 (69.9,    69.7,   70.2)),
    Row("ARC-challenge",    "arc_challenge",      0,    "acc_norm,none",                 (50.0,    50.8,   50.2)),
    Row("BBH",              "bbh_cot_fewshot",    3,    "exact_match,get-answer",        (42.2,    39.3,   43.1)),
    Row("RACE-middle",      "dsmoe_race_middle",  5,    "acc,none",                      (64.8,    63.9,   66.1)),
    Row("RACE-high",        "dsmoe_race_high",    5,    "acc,none",                      (50.6,    49.6,   50.8)),
    Row("DROP",             "drop",               1,    "em,none",                       (33.8,    40.0,   41.7)),
    Row("GSM8K",            "gsm8k_cot_zeroshot", 0,    "exact_match,flexible-extract",  (62.2,    63.4,   62.6)),
    Row("MATH",             "minerva_math",       4,    "exact_match,none",              (15.2,    13.5,   14.7)),
    Row("HumanEval",        "humaneval",          0,    "pass@1,create_test",            (45.7,    35.4,   45.1)),
    Row("MBPP",             "mbpp",               3,    "pass_at_1,none",                (46.2,    27.8,   39.0)),
    Row("TriviaQA",         "triviaqa",           5,    "exact_match,remove_whitespace", (63.3,    60.1,   59.5)),
    Row("NaturalQuestions", "nq_open",            0,    "exact_match,remove_whitespace", (35.1,    35.2,   32.7)),
    Row("MMLU",             "mmlu",               0,    "acc,none",                      (47.2,    50.0,   49.7)),
    Row("WinoGrande",       "winogrande",         0,    "acc,none",                      (69.0,    65.1,   68.4)),
    Row("CLUEWSC",          "dsmoe_cluewsc",      5,    "exact_match,none",              (68.2,    48.4,   66.2)),
    Row("C-Eval",           "ceval-valid",        0,    "acc,none",                      (40.0,    35.1,   44.7)),
    Row("CMMLU",            "cmmlu",              0,    "acc,none",                      (49.3,    36.9,   51.2)),
))

# The original repository shows these for the base model as a plot only.
LEADERBOARD: Final = Suite((), (
    #    benchmark           task              shots  metric
    Row("ARC-challenge",    "arc_challenge",   25,   "acc_norm,none"),
    Row("HellaSwag",        "hellaswag",       10,   "acc_norm,none"),
    Row("MMLU",             "mmlu",            5,    "acc,none"),
    Row("TruthfulQA",       "truthfulqa_mc2",  0,    "acc,none"),
    Row("WinoGrande",       "winogrande",      5,    "acc,none"),
    Row("GSM8K",            "gsm8k",           5,    "exact_match,strict-match"),
))
# fmt: on

SUITES: Final = {"base": BASE, "chat": CHAT, "leaderboard": LEADERBOARD}
_UNSCALED: Final = ("bits_per_byte", "perplexity")  # all others are fractions, reported in percent


def scale(metric: str) -> float:
    """Return the factor from the harness's unit of a metric to the paper's."""
    return 1.0 if metric.partition(",")[0].endswith(_UNSCALED) else 100.0


def named_tasks(names: Iterable[str]) -> Suite:
    """Return the suite of tasks given by name, with every metric of each."""
    return Suite((), tuple(Row(name, name, None, "") for name in names), is_list=True)
