"""Speed and memory on one NVIDIA GPU, against floors measured in the same run: `python -m tests.benchmarks.gpu`.

Start at `parts.py`, the table of what is measured in which order; `__main__.py` runs it, each part in a process of its
own, and `report.py` shows it. A bare machine needs Python 3.11 or newer (tokamax: 3.12), `jax[cuda13]`, `flax`, and for
the peers `torch` and `transformers`. What else is imported are pure Python packages, carried along as wheels:

    pip download -d wheels --no-deps jaxtyping wadler-lindig      # where there is a network
    pip install --no-index --find-links wheels --no-deps jaxtyping wadler-lindig  # on the machine, in the repository's root

and for tokamax the same two lines with `tokamax[cuda]` and without `--no-deps`, on a machine of the same Python and
platform. The package itself is not installed: run from the repository's root. Two runs of ten minutes:

    python -m tests.benchmarks.gpu                   # by priority; the report names what did not fit
    python -m tests.benchmarks.gpu --only PART,…     # the parts that it names

`--small` tries all of it at sizes that a CPU does in about a minute. `JAX_COMPILATION_CACHE_DIR` saves a second run the
compilations of the first.
"""
