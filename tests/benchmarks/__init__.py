"""Speed and memory against PyTorch, transformers and the machine's own limits: `python -m tests.benchmarks`.

Read `plan.py` for what is measured and the bars it is held to, then `children.py` for how turns are taken.
"""
