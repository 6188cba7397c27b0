"""Many adapters of one model at once: a row each, more than fit, and sums of them."""

from randlora.serving.check_rows import check_rows
from randlora.serving.combine import combine
from randlora.serving.pool import AdapterPool
from randlora.serving.routed import routed

__all__ = ["AdapterPool", "check_rows", "combine", "routed"]
