"""TRL's ``DPOTrainer``, group *robust* (not group *relative*): preference pairs with a ``group`` column.

    from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer

Everything that is TRL's stays TRL's; docs/trainers.md starts from a ``DPOTrainer`` and says what changes.
"""

try:
    import trl as _trl  # noqa: F401
except ImportError as error:
    raise ImportError(
        "grpo_kernels.integrations.trl needs TRL: pip install 'grpo-kernels[trl]' (TRL wants Python 3.11 or newer)"
    ) from error

from .contract import check_contract

check_contract()

from .config import GroupRobustDPOConfig  # noqa: E402
from .trainer import GroupRobustDPOTrainer  # noqa: E402

__all__ = ["GroupRobustDPOConfig", "GroupRobustDPOTrainer"]
