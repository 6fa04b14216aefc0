"""The Kubernetes operator of drumline: DistributedApps become pods, Services and what belongs to them."""
