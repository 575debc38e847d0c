"""The alphabet of shapes, used in signatures, einsum strings and name suffixes.

B batch          T query tokens       S key tokens         D hidden_size
N query heads    K key-value heads    G = N / K            H head width
E routed experts K experts per token  F feed-forward width V vocabulary     L layers
M = B·T tokens   R = M·K routed rows, sorted by expert

K is key-value heads in attention and top-k in MoE; `k` for the latter where both occur.
"""

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

__all__ = ["Array", "Bool", "Float", "Int", "PRNGKeyArray", "Shaped"]
