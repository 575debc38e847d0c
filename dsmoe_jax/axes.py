"""The alphabet of shapes, used in signatures, einsum strings and name suffixes.

B batch          T query tokens       S key tokens         D hidden_size
N query heads    K key-value heads    G = N / K            H head width
E routed experts A experts per token  F feed-forward width V vocabulary     L layers
M = B·T tokens in one row             R = M·A routed rows, sorted by expert
"""

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

__all__ = ["Array", "Bool", "Float", "Int", "PRNGKeyArray", "Shaped"]
