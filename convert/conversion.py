"""What a conversion has to say at its end: how much, how fast, and the proof."""

from dataclasses import dataclass
from pathlib import Path

from .cast import Loss


@dataclass(frozen=True)
class ConversionReport:
    """A finished import or export. `str` of it is what `dsmoe convert` and `dsmoe export` print."""

    path: Path
    tensors: int  # in Hugging Face's count: each expert's are its own
    bytes: int
    reused: int  # bytes that an interrupted run had written already
    seconds: float
    loss: Loss  # of a cast
    proof: str

    def __str__(self) -> str:
        """A few lines."""
        rate = (self.bytes - self.reused) / self.seconds / 1e9
        lines = [
            f"{self.path}: {self.tensors:,} tensors, {_size(self.bytes)} in {self.seconds:.1f} s ({rate:.2f} GB/s)"
        ]
        if self.reused:
            lines.append(f"  {_size(self.reused)} of them were there already, from an interrupted run")
        if self.loss.changed:
            lines.append(f"  the cast loses: {self.loss}")
        return "\n".join([*lines, f"  {self.proof}"])


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
