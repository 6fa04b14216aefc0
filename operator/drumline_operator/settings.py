"""What the operator is told from outside. PURE: reads nothing itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from drumline.errors import ConfigurationError

ENV_PREFIX: Final = "DRUMLINE_OPERATOR_"
#: What Kubernetes itself puts into pods of a namespace with a Service called drumline-operator.
_SERVICE_LINK: Final = re.compile(r"(SERVICE_(HOST|PORT)(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
_BIND: Final = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]]*):(?P<port>\d{1,5})")


def _listed(value: Any) -> Any:
    return tuple(part for part in re.split(r"[,\s]+", value) if part) if isinstance(value, str) else value


class OperatorSettings(BaseModel):
    """Settings that decide what the operator makes. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = Field(default="0.1.0", description="version of the operator, written on what it makes")
    namespace: str = Field(default="drumline-system", description="where the operator runs")
    cluster_domain: str = Field(default="cluster.local", description="DNS suffix of Services")
    worker_image: str = Field(default="", description="image of apps that have a source and no image; empty: none")
    git_image: str = Field(default="", description="image with git and sh that fetches sources; empty: the app's own")
    progress_interval: float = Field(
        default=10.0,
        gt=0,
        description="look again whether a name that somebody else has is free, and why a pod that has a node does not begin",
    )
    replace_interval: float = Field(
        default=60.0,
        gt=0,
        description="a pod that RecreatePod replaces, or a child that must be made anew, has lived at least this long",
    )


class ProcessSettings(BaseModel):
    """Settings of the operator's process. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bind: str = Field(
        default=":8080",
        pattern=f"^{_BIND.pattern}$",
        description="HOST:PORT of /healthz, /readyz and /metrics; without HOST all addresses, port 0 picks one",
    )
    log_format: Literal["auto", "text", "json"] = Field(default="auto", description="auto: text on a TTY, else json")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="lowest level shown")
    watch_namespaces: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(), description="namespaces of apps, with commas between; empty: all"
    )
    watch_nodes: bool = Field(default=True, description="count the nodes of MachineTypes; needs leave to list nodes")
    workers: int = Field(default=16, ge=1, le=256, description="apps that are worked on at a time")
    resync: float = Field(default=600.0, gt=0, description="look at an app again though nothing was heard of it")
    relist: float = Field(default=300.0, gt=0, description="compare the watched apps with a list of them")
    request_timeout: float = Field(default=15.0, gt=0, description="bound on one call to the API server")
    leader_election: bool = Field(default=True, description="work only while holding the Lease")
    lease_name: str = Field(default="drumline-operator", min_length=1, description="name of that Lease")
    identity: str = Field(default="", description="who holds it; empty: the host's name and random letters")
    lease_duration: float = Field(default=15.0, ge=1, description="others wait this long for a renewal")
    renew_deadline: float = Field(default=10.0, gt=0, description="the leader gives up after this long without one")
    retry_period: float = Field(default=2.0, gt=0, description="between two attempts to get or renew the Lease")

    @model_validator(mode="after")
    def _lease_times(self) -> ProcessSettings:
        # The same rules as every other user of Leases: a leader stops before anybody else may start.
        if self.lease_duration != int(self.lease_duration):
            raise ValueError("lease_duration must be whole seconds: a Lease has no others")
        if not self.retry_period * 1.2 < self.renew_deadline < self.lease_duration:
            raise ValueError(
                "lease_duration must be more than renew_deadline, and that more than 1.2 times retry_period"
            )
        return self

    @property
    def address(self) -> tuple[str | None, int]:
        """Host (None: all addresses) and port of ``bind``."""
        found = _BIND.fullmatch(self.bind)
        assert found is not None
        return found["host"].strip("[]") or None, int(found["port"])


def from_env(environ: Mapping[str, str]) -> tuple[OperatorSettings, ProcessSettings]:
    """Read both from ``DRUMLINE_OPERATOR_*`` variables; one that is empty counts as not set.

    Raises:
        ConfigurationError: a variable is unknown or has a bad value; the message names it.
    """
    given = {
        name.removeprefix(ENV_PREFIX): text
        for name, text in environ.items()
        if name.startswith(ENV_PREFIX) and text.strip()
    }
    known = {field.upper() for model in (OperatorSettings, ProcessSettings) for field in model.model_fields}
    for name in given.keys() - known:
        if not _SERVICE_LINK.fullmatch(name):
            listed = ", ".join(sorted(ENV_PREFIX + each for each in known))
            raise ConfigurationError(f"{ENV_PREFIX}{name}: no such setting; known are {listed}")
    return _model(OperatorSettings, given), _model(ProcessSettings, given)


_Model = TypeVar("_Model", bound=BaseModel)


def _model(model: type[_Model], given: Mapping[str, str]) -> _Model:
    values = {name: given[name.upper()].strip() for name in model.model_fields if name.upper() in given}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{ENV_PREFIX}{str(each['loc'][0]).upper()}: {each['msg']}, not {each['input']!r}"
            if each["loc"]
            else each["msg"].removeprefix("Value error, ")
            for each in error.errors(include_url=False)
        ]
        raise ConfigurationError("; ".join(lines)) from None
