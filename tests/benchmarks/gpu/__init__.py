"""Speed and memory on one NVIDIA GPU, against floors measured in the same run: `python -m tests.benchmarks.gpu`.

Start at `parts.py`, the table of what is measured in which order; `__main__.py` runs it, each part in a process of its
own, and `report.py` shows it. Beside Python 3.11 or newer it needs `jax[cuda13]`, `flax`, `optax`, `jaxtyping`, `rich`
and `numpy`; tokamax (Python 3.12) where there is one, and rows that miss it say so. Run it from the repository's root:

    python -m tests.benchmarks.gpu                   # by priority; the report names what did not fit
    python -m tests.benchmarks.gpu --only PART,…     # the parts that it names

`--small` tries all of it at sizes that two cores do in two minutes. `JAX_COMPILATION_CACHE_DIR` saves a second run
the compilations of the first. PyTorch and transformers are not measured here.
"""
