"""The command lines of the components. Pure: the same node gives the same words."""

from __future__ import annotations

from .layout import API_PORT, CLUSTER_DOMAIN, NODE_LABEL, PACKAGE, Network, Node

PKI = "/etc/kubernetes/pki"
CONFIG = "/etc/kubernetes"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
#: The default is outside of what a node has for itself.
VOLUME_PLUGINS = "/var/lib/kubelet/volume-plugins"
#: Label, annotation and taint of nodes that only exist in the API, for which kwok plays the kubelet.
FAKE_MARK = "kwok.x-k8s.io/node"
FAKE_VALUE = "fake"
#: A collection when the heap is five times what lives, not twice, until it is large: the control plane of a small machine
#: spends a sixth of its CPU time on collections otherwise, mostly of garbage of the requests just answered.
GO_SETTINGS = {"GOGC": "400", "GOMEMLIMIT": "1536MiB"}
#: What kwok plays.
STAGES = PACKAGE / "manifests" / "kwok-stages.yaml"


def start_order(node: Node) -> list[str]:
    """What a node runs, in the order of its start."""
    control_plane = ["kube-apiserver", "kube-controller-manager", "kube-scheduler"] if node.is_control_plane else []
    return [*(["etcd"] if node.is_control_plane else []), "containerd", *control_plane, "kubelet", "kube-proxy"]


def arguments(component: str, node: Node) -> list[str]:
    """The command line of a component on a node.

    Raises:
        KeyError: There is no such component.
    """
    return {
        "etcd": etcd,
        "containerd": containerd,
        "kube-apiserver": kube_apiserver,
        "kube-controller-manager": kube_controller_manager,
        "kube-scheduler": kube_scheduler,
        "kubelet": kubelet,
        "kube-proxy": kube_proxy,
        "kwok": kwok,
    }[component](node)


def etcd_flags(data: str, client: str, peer: str) -> list[str]:
    """An etcd of one member that is quick rather than durable.

    Args:
        data: Its directory.
        client: The URL for clients.
        peer: The URL for other members, of which there are none.
    """
    return [
        f"--data-dir={data}",
        "--unsafe-no-fsync",
        "--log-level=warn",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
    ]


def etcd(_node: Node) -> list[str]:
    """On the node's tmpfs."""
    return ["etcd", *etcd_flags("/var/lib/etcd", "http://127.0.0.1:2379", "http://127.0.0.1:2380")]


def containerd(_node: Node) -> list[str]:
    """The container runtime."""
    return ["containerd", f"--config={CONFIG}/containerd.toml"]


def api_server_flags(pki: str, etcd_url: str, services: str) -> list[str]:
    """What every API server of ours is told, in a cluster or alone.

    Args:
        pki: The directory of certificates.
        etcd_url: Where etcd answers.
        services: The range of ClusterIPs.
    """
    return [
        f"--etcd-servers={etcd_url}",
        f"--service-cluster-ip-range={services}",
        f"--client-ca-file={pki}/ca.crt",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--service-account-issuer=https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
        f"--service-account-key-file={pki}/service-account.pub",
        f"--service-account-signing-key-file={pki}/service-account.key",
        "--authorization-mode=Node,RBAC",
        "--allow-privileged=true",
    ]


def kube_apiserver(node: Node) -> list[str]:
    """The API server, which the machine, the nodes and pods reach at the node's address."""
    return [
        "kube-apiserver",
        *api_server_flags(PKI, "http://127.0.0.1:2379", node.network.services),
        f"--bind-address={node.address}",
        f"--secure-port={API_PORT}",
        f"--advertise-address={node.address}",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet.key",
        f"--kubelet-certificate-authority={PKI}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        "--enable-admission-plugins=NodeRestriction",
        # Pods leave a lost node after 30 s instead of 300 s.
        "--default-not-ready-toleration-seconds=30",
        "--default-unreachable-toleration-seconds=30",
        f"--requestheader-client-ca-file={PKI}/ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={PKI}/front-proxy-client.crt",
        f"--proxy-client-key-file={PKI}/front-proxy-client.key",
    ]


def _with_kubeconfig(name: str) -> list[str]:
    file = f"{PKI}/{name}.kubeconfig"
    flags = [f"--{flag}={file}" for flag in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")]
    # With the usual limits on its own requests, the controller manager alone takes 5 s to start.
    limits = ["--kube-api-qps=500", "--kube-api-burst=1000"]
    return [name, *flags, *limits, "--bind-address=127.0.0.1", "--leader-elect=false"]


def kube_controller_manager(_node: Node) -> list[str]:
    """Started when the API server is ready: before, it would end with "forbidden", because its roles are not there."""
    return [
        *_with_kubeconfig("kube-controller-manager"),
        "--use-service-account-credentials",
        f"--service-account-private-key-file={PKI}/service-account.key",
        f"--root-ca-file={PKI}/ca.crt",
        f"--cluster-signing-cert-file={PKI}/ca.crt",
        f"--cluster-signing-key-file={PKI}/ca.key",
        "--allocate-node-cidrs=false",
        f"--flex-volume-plugin-dir={VOLUME_PLUGINS}",
        "--node-monitor-grace-period=20s",
    ]


def kube_scheduler(_node: Node) -> list[str]:
    """The scheduler."""
    return _with_kubeconfig("kube-scheduler")


def kubelet(node: Node) -> list[str]:
    """The kubelet; labels count when the node registers for the first time."""
    labels = {NODE_LABEL: "true"} | dict(node.labels)
    return [
        "kubelet",
        f"--config={CONFIG}/kubelet.json",
        f"--kubeconfig={PKI}/{node.name}-kubelet.kubeconfig",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        f"--node-labels={','.join(f'{key}={value}' for key, value in labels.items())}",
    ]


def kube_proxy(_node: Node) -> list[str]:
    """Services."""
    return ["kube-proxy", f"--config={CONFIG}/kube-proxy.json"]


def kwok(_node: Node) -> list[str]:
    """On the control plane, once there are fake nodes."""
    return [
        "kwok",
        f"--kubeconfig={PKI}/admin.kubeconfig",
        f"--config={CONFIG}/{STAGES.name}",
        "--manage-all-nodes=false",
        f"--manage-nodes-with-annotation-selector={FAKE_MARK}={FAKE_VALUE}",
        "--node-lease-duration-seconds=40",
        "--server-address=127.0.0.1:10247",
        "--v=WARN",  # else a line for every object it touches
    ]


def api_server_address(network: Network) -> tuple[str, int]:
    """Where the API server listens."""
    return Node(1, network).address, API_PORT
