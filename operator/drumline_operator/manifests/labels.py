"""Labels of everything that belongs to an app. PURE."""

from __future__ import annotations

from typing import Final

from drumline.api.v1alpha1 import GROUP

APP: Final = f"{GROUP}/app"
REVISION: Final = f"{GROUP}/revision"
CLIENT: Final = f"{GROUP}/client"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
OPERATOR: Final = "drumline-operator"


def selector(app: str) -> dict[str, str]:
    """Return the labels that select the app's pods; they never change, a Deployment's selector cannot."""
    return {APP: app}


def common(app: str) -> dict[str, str]:
    """Return the labels of every child."""
    return {
        APP: app,
        "app.kubernetes.io/name": app,
        "app.kubernetes.io/instance": app,
        "app.kubernetes.io/component": "worker",
        "app.kubernetes.io/part-of": "drumline",
        MANAGED_BY: OPERATOR,
    }


def text(labels: dict[str, str]) -> str:
    """Return ``labels`` as a selector in one line."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
