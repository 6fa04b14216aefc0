"""What the operator is told from outside. PURE: reads nothing itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class OperatorSettings(BaseModel):
    """Settings that decide what the operator makes. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = Field(default="0.1.0", description="version of the operator, written on what it makes")
    namespace: str = Field(default="drumline-system", description="where the operator runs")
    cluster_domain: str = Field(default="cluster.local", description="DNS suffix of Services")
    worker_image: str = Field(default="", description="image of apps that have a source and no image; empty: none")
    git_image: str = Field(default="", description="image with git and sh that fetches sources; empty: the app's own")
    progress_interval: float = Field(default=10.0, gt=0, description="look again while ranks load")
