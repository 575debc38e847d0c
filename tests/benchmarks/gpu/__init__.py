r"""Speed and memory on one NVIDIA GPU, against floors measured in the same run: `python -m tests.benchmarks.gpu`.

Start at `parts.py`, the table of what is measured in which order; `__main__.py` runs it, each part in a process of its
own, `bars.py` has what it should reach, `report.py` shows it. From the repository's root, in two runs of ten minutes:

    python -m tests.benchmarks.gpu --only decode,experts,train,transformers,prefill     # all that has a bar
    python -m tests.benchmarks.gpu --only block,torch_experts,int8,matmuls,finetune,train_whole,experts_more,\
ragged_fused,ragged_plain

The second goes on with the first one's report in `--out` where day, card, commit, files and versions are the same; a
run of anything else gets a report of its own. Parts that do not fit are named; `--minutes` gives more, or less where no
command may outlast ten. `JAX_COMPILATION_CACHE_DIR` saves a second run the compilations of the first. Without a GPU, or
with `--small`, all of it is tried at sizes that two cores do in three minutes.

It needs Python 3.11 or newer, `jax[cuda13]`, `flax`, `optax`, `jaxtyping`, `rich` and `numpy`; for some parts torch,
transformers, and tokamax (Python 3.12, jax 0.11.1 or newer). What is missing is said in its rows. To a machine without
network, carry along what it lacks: on one with the same Python,

    pip download -d wheels --no-deps tokamax==0.0.17 jax-triton==0.4.1 qwix xprof fire termcolor immutabledict \
einshape pydantic pydantic_core annotated-types typing-inspection six tqdm jaxtyping wadler-lindig

(40 MB), and there `pip install --no-index --find-links wheels --no-deps wheels/*.whl`.
"""
