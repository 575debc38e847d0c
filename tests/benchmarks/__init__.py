"""Speed and memory compared with PyTorch, transformers and hardware limits: `python -m tests.benchmarks`.

`plan.py` defines the measurements and their targets, `children.py` interleaves the contenders.
"""
