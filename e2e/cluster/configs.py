"""The configuration files of the components on a node. Pure: the same node gives the same text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .components import CONTAINERD_SOCKET, PKI, VOLUME_PLUGINS
from .layout import CLUSTER_DOMAIN, Node


def files(node: Node, *, pause: str, plugins: Sequence[Path], proxy_mode: str, open_files: int) -> dict[str, str]:
    """Contents by file name, for the node's /etc/kubernetes.

    Args:
        node: Whose.
        pause: The image that holds a pod's namespaces.
        plugins: Directories of CNI plugins.
        proxy_mode: kube-proxy's.
        open_files: The highest number of open files that the kubelet may allow itself.
    """
    values = {
        "kubelet.json": kubelet(node, open_files),
        "kube-proxy.json": kube_proxy(node, proxy_mode),
        "cni.conflist": cni(node),
    }
    texts = {name: json.dumps(value, indent=1) for name, value in values.items()}
    return texts | {"containerd.toml": containerd(pause, plugins)}


def containerd(pause: str, plugins: Sequence[Path]) -> str:
    """Containerd 2 for the kubelet."""
    return f"""\
version = 3
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = {json.dumps(pause)}
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true  # we may lack the capability to lower it
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = {json.dumps([str(path) for path in plugins])}
    conf_dir = '/etc/cni/net.d'
    use_internal_loopback = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      SystemdCgroup = false
[plugins.'io.containerd.nri.v1.nri']
  disable = true
"""


def cni(node: Node) -> dict[str, Any]:
    """The pod network: a bridge per node."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": node.pod_network}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/run/cni",
    }
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipMasq": False,  # every address that a pod can reach has a route back to the pod
        "ipam": ipam,
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}, "backend": "nftables"}
    return {"cniVersion": "1.0.0", "name": "drumline", "plugins": [bridge, ports]}


def kubelet(node: Node, open_files: int) -> dict[str, Any]:
    """The kubelet's settings, with its pods in the node's own cgroup."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{PKI}/{node.name}-kubelet-server.crt",
        "tlsPrivateKeyFile": f"{PKI}/{node.name}-kubelet-server.key",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.network.cgroup}/{node.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,  # we may lack the capability to lower it
        "maxOpenFiles": min(open_files, 1_000_000),
        "clusterDNS": [node.network.dns],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": "/etc/resolv.conf",
        "volumePluginDir": VOLUME_PLUGINS,
        # The disk is the machine's: a nearly full one is no reason to remove images or pods.
        "evictionHard": {"memory.available": "200Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "nodeStatusUpdateFrequency": "2s",
    }


def kube_proxy(node: Node, mode: str) -> dict[str, Any]:
    """kube-proxy's settings, without those that belong to the whole machine."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{PKI}/kube-proxy.kubeconfig"},
        "hostnameOverride": node.name,
        "mode": mode,
        "clusterCIDR": node.network.pods,
        "oomScoreAdj": 0,
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
