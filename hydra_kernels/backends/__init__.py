"""The implementations of every op. Importing this registers them all."""

from hydra_kernels.backends.reference import advantages as _reference_advantages  # noqa: F401
from hydra_kernels.backends.reference import gae as _reference_gae  # noqa: F401
from hydra_kernels.backends.reference import kl_rewards as _reference_kl_rewards  # noqa: F401
from hydra_kernels.backends.reference import masked_whiten as _reference_masked_whiten  # noqa: F401
