"""Names of an app's children. PURE. All are the app's own: one kind, one name."""

from __future__ import annotations

from typing import Final

from drumline.api.v1alpha1 import GROUP

#: Kinds of children, in the order in which they are made: the Service before the pods that it leads to.
API_VERSIONS: Final = {
    "Service": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "Deployment": "apps/v1",
}
FIELD_MANAGER: Final = "drumline-operator"

#: Annotations of the Deployment.
INPUTS: Final = f"{GROUP}/inputs"
TEMPLATE: Final = f"{GROUP}/pod-template"
RENDERED_BY: Final = f"{GROUP}/rendered-by"
