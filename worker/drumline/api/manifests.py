"""Manifest files: reading a DistributedApp, saying what is wrong with it, and turning it into the runner's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from drumline.api.v1alpha1 import API_VERSION, GROUP, DistributedApp, yaml_name
from drumline.contract import ENV_PREFIX, RunnerSettings
from drumline.details import did_you_mean
from drumline.errors import ConfigurationError

_KIND = "DistributedApp"
#: ``hangTimeoutSeconds: 0`` means never; the settings have no such word, but thirty years will do.
_NEVER = 1e9

#: What the API server takes at most in one request, and values that no manifest in it needs.
_LARGEST_FILE = 3 << 20
_MOST_VALUES = 200_000
_DEEPEST = 60
_LONGEST_EXCERPT = 80

#: The one table between the manifest and RunnerSettings. What is not in it does not concern the process.
TABLE: Mapping[str, tuple[str, Callable[[DistributedApp], Any]]] = {
    "name": ("metadata.name", lambda app: app.metadata.name),
    "namespace": ("metadata.namespace", lambda app: app.metadata.namespace),
    "setup_args": ("spec.setupArgs", lambda app: app.spec.setup_args),
    "warmup_payload": ("spec.warmupPayload", lambda app: app.spec.warmup_payload),
    "num_gpus": ("spec.numGPUs", lambda app: app.spec.num_gpus),
    "world_size": ("spec.numGPUs, spec.worldSize", lambda app: app.spec.num_gpus or app.spec.world_size or 1),
    # A CPU app stays on the CPU also where GPUs are.
    "device": ("spec.numGPUs", lambda app: "auto" if app.spec.num_gpus else "cpu"),
    "backend": ("spec.communication.backend", lambda app: app.spec.communication.backend.lower()),
    "collective_timeout": ("spec.communication.timeoutSeconds", lambda app: app.spec.communication.timeout_seconds),
    "port": ("spec.serving.port", lambda app: app.spec.serving.port),
    "request_timeout": ("spec.serving.requestTimeoutSeconds", lambda app: app.spec.serving.request_timeout_seconds),
    "startup_timeout": ("spec.serving.startupTimeoutSeconds", lambda app: app.spec.serving.startup_timeout_seconds),
    "max_queue_depth": ("spec.serving.maxQueueDepth", lambda app: app.spec.serving.max_queue_depth),
    "stream_keepalive": ("spec.serving.streamKeepaliveSeconds", lambda app: app.spec.serving.stream_keepalive_seconds),
    "drain_timeout": ("spec.rollout.drainTimeoutSeconds", lambda app: app.spec.rollout.drain_timeout_seconds),
    "hang_timeout": (
        "spec.failurePolicy.hangTimeoutSeconds",
        lambda app: app.spec.failure_policy.hang_timeout_seconds or _NEVER,
    ),
    "restart": (
        "spec.failurePolicy",
        lambda app: {
            "max_restarts": app.spec.failure_policy.max_group_restarts
            if app.spec.failure_policy.type == "RestartGroup"
            else 0,
            "window_seconds": app.spec.failure_policy.window_seconds,
        },
    ),
}


def to_settings(app: DistributedApp, *, folder: Path | None = None) -> RunnerSettings:
    """Return the settings for one replica of ``app``.

    Args:
        app: the manifest.
        folder: where its modules are looked for first (the manifest's own folder); None: ``sys.path`` alone, as in the
            container, whose working directory is on it.

    Raises:
        ConfigurationError: a ``DRUMLINE_*`` variable in ``spec.env`` is wrong. Such variables win over other fields.
    """
    module = app.spec.worker_class
    values = {field: read(app) for field, (_, read) in TABLE.items()}
    settings = RunnerSettings.checked({"target": str(folder / module) if folder else module, **values})
    own = {name: value for name, value in plain_env(app).items() if name.startswith(ENV_PREFIX)}
    return RunnerSettings.from_env({**settings.to_env(), **own}) if own else settings


def plain_env(app: DistributedApp) -> dict[str, str]:
    """The variables of ``spec.env`` that have their value in the manifest."""
    return {item.name: item.value or "" for item in app.spec.env if item.value_from is None}


def local_notes(app: DistributedApp) -> tuple[str, ...]:
    """Sentences about what the manifest asks for and one machine cannot give; empty for most manifests."""
    notes = []
    if outside := [item.name for item in app.spec.env if item.value_from is not None]:
        notes.append(f"spec.env: {', '.join(outside)} come from the cluster; set them in your shell")
    if app.spec.env_from:
        notes.append("spec.envFrom comes from the cluster; set those variables in your shell")
    if app.spec.serving.auth.type == "APIKey":
        notes.append(f"spec.serving.auth is not applied here; set {ENV_PREFIX}API_KEYS to ask for keys")
    if app.spec.image is None and app.spec.source is None:
        notes.append("kubectl apply will ask for spec.image, spec.source, or both")
    return tuple(notes)


def load_manifest(path: str | Path) -> DistributedApp:
    """Read the one DistributedApp of a YAML file; documents of other kinds are skipped.

    Raises:
        ConfigurationError: no such file, not YAML, no DistributedApp or several, another apiVersion, or fields that
            are unknown or wrong; the message names each field.
    """
    file = Path(path)
    try:
        with file.open("rb") as opened:
            data = opened.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise ConfigurationError(f"{file}: larger than {_LARGEST_FILE >> 20} MiB, which no API server takes either")
        documents = _documents(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file}: not a text file in UTF-8") from None
    except RecursionError:
        raise ConfigurationError(f"{file}: nested too deeply; a manifest needs a few levels") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{file}: not YAML: {error}") from None
    found = [each for each in documents if isinstance(each, dict) and each.get("kind") == _KIND]
    if len(found) != 1:
        kinds = [str(each.get("kind")) if isinstance(each, dict) else type(each).__name__ for each in documents]
        has = ", ".join(_short(kind) for kind in kinds[:9]) or "none at all"
        what = f"{len(found)} documents" if found else f"no document (it has {has})"
        raise ConfigurationError(f"{file}: {what} of kind {_KIND}; a target needs exactly one")
    version = found[0].get("apiVersion")
    if version != API_VERSION:
        known = str(version).startswith(GROUP + "/")
        raise ConfigurationError(
            f"{file}: apiVersion {_short(repr(version))} is {'not known to this drumline' if known else 'not ours'}; "
            f"write {API_VERSION}"
        )
    try:
        app = DistributedApp.model_validate(found[0], by_name=False)
    except ValidationError as error:
        lines = sentences(error, DistributedApp)
        raise ConfigurationError("\n".join(f"{file}: {line}" for line in lines)) from None
    for number, item in enumerate(app.spec.env):
        if "\0" in (item.value or ""):
            raise ConfigurationError(
                f"{file}: spec.env[{number}].value: no variable can hold a zero byte; leave it out"
            )
    return app


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_EXCERPT else text[:_LONGEST_EXCERPT] + "..."


def sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return what is wrong, one sentence for each field, with its place and, where one is known, the cure.

    Args:
        error: what validation against ``model`` raised.
        model: whose fields are named where one is misspelt.
    """
    lines = [_sentence(each["loc"], each["msg"], each["type"], model) for each in error.errors(include_url=False)]
    return list(dict.fromkeys(lines))


def _sentence(loc: Sequence[str | int], message: str, kind: str, model: type[BaseModel]) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if kind == "extra_forbidden":
        return f"{place}: no such field{did_you_mean(yaml_name(str(loc[-1])), _fields_at(model, loc[:-1]))}"
    message = message.removeprefix("Value error, ").removeprefix("Field ")
    return f"{place}: {message}" if place else message


def _fields_at(root: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Names that may stand where ``loc`` points to."""
    model: Any = root
    for part in loc:
        if not isinstance(part, int):
            fields = {field.alias: field for field in model.model_fields.values()}
            model = _model_in(fields[part].annotation) if part in fields else None
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _documents(text: str) -> list[Any]:
    # Derived from SafeLoader: it builds plain data only.
    loader, found = _Loader(text), []
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is not None:
                _values(node, {})
                found.append(loader.construct_document(node))
    except (ValueError, OverflowError) as error:  # an escape of no character, a number with too many digits
        raise yaml.constructor.ConstructorError(None, None, str(error), loader.get_mark()) from None
    finally:
        loader.dispose()
    return [each for each in found if each is not None]


def _values(node: yaml.Node, known: dict[yaml.Node, int], depth: int = 0) -> int:
    """Count the values below ``node`` as if every alias were written out: a few lines of them can be billions."""
    if node in known:
        if not known[node]:
            raise _wrong(node, "an alias of what it lies in")
        return known[node]
    if depth > _DEEPEST:
        raise _wrong(node, f"nested more than {_DEEPEST} levels deep")
    known[node] = 0
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_values(each, known, depth + 1) for each in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_values(each, known, depth + 1) for pair in node.value for each in pair)
    if total > _MOST_VALUES:
        raise _wrong(node, f"more than {_MOST_VALUES} values, with what aliases stand for")
    known[node] = total
    return total


def _wrong(node: yaml.Node, text: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it, into what JSON can say: a repeated key is an error, and a date is a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _wrong(key, f"key {key.value!r} twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise _wrong(node, "half of a surrogate pair is no text; write the character itself")
        return value

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if ":" in node.value:
            return node.value  # 1:30 is a text to everybody but YAML 1.1
        make = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        try:
            number = make(node)
        except (ValueError, IndexError):
            raise _wrong(node, f"{_short(repr(node.value))} is not a number") from None
        if isinstance(number, int) and number.bit_length() > 63:
            raise _wrong(node, "an integer of more than 64 bits; write it in quotes")
        if not abs(number) < float("inf"):
            raise _wrong(node, "JSON has no NaN and no infinity; write it in quotes")
        return number

    def construct_bool(self, node: yaml.ScalarNode) -> Any:
        if node.value.lower() not in self.bool_values:
            raise _wrong(node, f"{_short(repr(node.value))} is neither true nor false")
        return self.construct_yaml_bool(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
#: Without those of SafeLoader that build what JSON has no word for: dates, bytes, sets, pairs.
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in {"null", "str", "seq", "map"}
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_bool)
