r"""Speed and memory on one NVIDIA GPU, with floors measured in the same run: `python -m tests.benchmarks.gpu`.

Start at `parts.py`, the table of measurements in order of priority; `__main__.py` runs each part in a separate process,
`bars.py` has the targets. From the repository's root, in two runs of ten minutes:

    python -m tests.benchmarks.gpu --only decode,experts,train,transformers,prefill     # all that has a bar
    python -m tests.benchmarks.gpu --only block,torch_experts,int8,matmuls,finetune,train_whole,experts_more,\
ragged_fused,ragged_plain

The second run continues the first one's report in `--out` if day, card, commit, files and versions are equal; otherwise
it starts a new one. `--minutes` sets the time budget; parts beyond it are listed as not run. Set
`JAX_COMPILATION_CACHE_DIR` to reuse compilations. Without a GPU, or with `--small`, everything runs at small sizes:
three minutes on two cores.

Needs Python 3.11 or newer, `jax[cuda13]`, `flax`, `optax`, `jaxtyping`, `rich` and `numpy`; some parts need torch,
transformers, or tokamax (Python 3.12, jax 0.11.1 or newer), and report what is missing. For a machine without network,
download the wheels on one with the same Python:

    pip download -d wheels --no-deps tokamax==0.0.17 jax-triton==0.4.1 qwix xprof fire termcolor immutabledict \
einshape pydantic pydantic_core annotated-types typing-inspection six tqdm jaxtyping wadler-lindig

(40 MB), then `pip install --no-index --find-links wheels --no-deps wheels/*.whl`.
"""
