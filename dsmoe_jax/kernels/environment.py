"""Environment variables that choose kernels: `check_environment`."""

from dsmoe_jax.kernels import attention, expert_ffn, tuning


def check_environment() -> None:
    """Raise `DSMoEError` that names the variable whose value is invalid; call it before long work."""
    expert_ffn.requested_legs()
    attention.requested_backend()
    tuning.check_file()
