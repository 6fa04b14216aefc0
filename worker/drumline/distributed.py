"""``drumline.distributed``: the names that ``fal.distributed`` has."""

from drumline.runner.runner import DistributedRunner
from drumline.worker import DistributedWorker, RequestContext

__all__ = ["DistributedRunner", "DistributedWorker", "RequestContext"]
