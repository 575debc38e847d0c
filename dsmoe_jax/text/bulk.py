"""Encode many documents in worker processes. Start at `BulkEncoder`.

Processes rather than the threads of tokenizers: those share one cache and its lock, and turning ids into arrays holds
the GIL. A worker ends with its input, so none outlives this process.
"""

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import Tokenizer

_AHEAD: Final = 2  # batches per worker that are read ahead
_PROGRAM: Final = "import sys; sys.path[:] = sys.argv[1:]; from dsmoe_jax.text.bulk import serve; serve()"
_ENVIRONMENT: Final = {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
Label = TypeVar("Label")


class Encoded(NamedTuple):
    """A batch of n documents.

    Attributes:
        ids: Token ids of all documents, concatenated: BOS as configured, text, EOS.
        lengths: int64 [n], in tokens.
        text_bytes: int64 [n], UTF-8 bytes of the texts.
        hashes: uint64 [n], see `split_hash`.
        keys: 128-bit hash of each text, uint64 [n, 2]; [0, 2] unless requested.
        special_tokens: Strings of special tokens in the texts.
        with_special_tokens: Texts that have some.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    hashes: np.ndarray
    keys: np.ndarray
    special_tokens: int
    with_special_tokens: int


def split_hash(content: bytes) -> int:
    """Return the 64-bit hash that decides the split of a document."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype, *, keys: bool) -> Encoded:
    """Encode a batch of documents; `keys` requests a hash of each text to find copies."""
    eos = tokenizer.eos_token_id
    found = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in tokenizer.encode_batch(texts)]  # some add EOS
    contents = [text.encode() for text in texts]
    special = [tokenizer.count_special_tokens(text) for text in texts]
    digests = b"".join(hashlib.blake2b(content, digest_size=16).digest() for content in contents) if keys else b""
    return Encoded(
        np.concatenate([np.zeros(0, dtype), *(np.array(ids, dtype) for ids in found)]),
        np.array([len(ids) for ids in found], np.int64),
        np.array([len(content) for content in contents], np.int64),
        np.array([split_hash(content) for content in contents], np.uint64),
        np.frombuffer(digests, np.uint64).reshape(-1, 2),
        sum(special),
        sum(map(bool, special)),
    )


class BulkEncoder:
    """Encodes batches in worker processes, or in this process; the results are the same and in order."""

    def __init__(self, folder: Path, *, workers: int, split_special_tokens: bool, dtype: np.dtype, keys: bool):
        """Start the processes.

        Args:
            folder: Folder of the tokenizer.
            workers: Number of processes; 0 encodes in this one, with the threads of tokenizers.
            split_special_tokens: Encode special-token strings as text.
            dtype: Type of the token ids.
            keys: Hash the texts to find copies.
        """
        self._job = {"folder": str(folder), "split": split_special_tokens, "dtype": dtype.str, "keys": keys}
        self._workers = [_Worker(self._job) for _ in range(workers)]

    def close(self) -> None:
        """End the processes, even while they encode."""
        for worker in self._workers:
            worker.close()

    def encode(self, batches: Iterable[tuple[Label, Sequence[str]]]) -> Generator[tuple[Label, Encoded], None, None]:
        """Encode labeled batches of texts; yield each label with the result, in order.

        Raises:
            DSMoEError: The tokenizer fails on a text.
            ChildProcessError: A worker process has ended.
        """
        if not self._workers:
            encoder = _Encoder(self._job)
            yield from ((label, encoder(texts)) for label, texts in batches)
            return
        free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            free.put(worker)

        def run(texts: Sequence[str]) -> Encoded:
            worker = free.get()
            try:
                return worker.encode(texts)
            finally:
                free.put(worker)

        pool, pending = ThreadPoolExecutor(len(self._workers)), deque[tuple[Label, "Future[Encoded]"]]()
        try:
            for label, texts in batches:
                pending.append((label, pool.submit(run, texts)))
                if len(pending) > _AHEAD * len(self._workers):
                    done, future = pending.popleft()
                    yield done, future.result()
            yield from ((label, future.result()) for label, future in pending)
        finally:
            # Threads that wait for a worker end with it.
            if any(not future.done() for _, future in pending):
                self.close()
            pool.shutdown(cancel_futures=True)


class _Encoder:
    """Encodes batches in this process."""

    def __init__(self, job: dict[str, Any]):
        self._tokenizer = Tokenizer.from_pretrained(job["folder"], split_special_tokens=job["split"], verify=False)
        self._dtype, self._keys = np.dtype(job["dtype"]), job["keys"]

    def __call__(self, texts: Sequence[str]) -> Encoded:
        return encode_documents(self._tokenizer, texts, self._dtype, keys=self._keys)


class _Worker:
    """A process that encodes one batch at a time."""

    def __init__(self, job: dict[str, Any]):
        if not sys.executable:
            raise DSMoEError("workers must be 0: sys.executable is empty")
        # -I ignores the environment and the current folder; a new session does not receive Ctrl-C.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-W", "ignore", "-c", _PROGRAM, *filter(None, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,
        )
        with contextlib.suppress(BrokenPipeError):  # `encode` names the reason
            self._send(job)

    def encode(self, texts: Sequence[str]) -> Encoded:
        assert self._process.stdout is not None
        try:
            self._send(texts)
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            code = self._process.wait()
            reason = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            hint = "; if memory was short, pass fewer --workers" if code == -9 else ""
            raise ChildProcessError(f"tokenization: worker process {self._process.pid} {reason}{hint}") from None
        if isinstance(answer, str):
            raise DSMoEError(answer)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError, ValueError):  # unsent bytes
                stream.close()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin, protocol=5)
        self._process.stdin.flush()


def serve() -> None:
    """Encode the batches on standard input until it ends; the program of a worker."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write to the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        encoder = _Encoder(pickle.load(requests))
        while True:
            texts = pickle.load(requests)
            try:
                answer: Any = encoder(texts)
            except DSMoEError as error:
                answer = str(error)
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
