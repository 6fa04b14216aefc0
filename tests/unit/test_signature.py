"""The request model that is read from a worker's ``__call__``."""

import enum
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from drumline.errors import ConfigurationError, InvalidPayload
from drumline.signature import request_model

if TYPE_CHECKING:
    import nowhere


class Mode(enum.Enum):
    FAST = "fast"
    BEST = "best"


@dataclass
class Size:
    width: int
    height: int = 8


class Style(BaseModel):
    name: str
    weight: float = 1.0


class Opaque:
    """A class that pydantic has no schema for."""


class Typed:
    """A worker.

    Args:
        prompt: what to draw,
            in words.
        steps (int): how often.
    """

    def __call__(
        self,
        prompt: str,
        streaming: bool = False,
        steps: Annotated[int, Field(ge=1, le=50)] = 20,
        mode: Mode = Mode.FAST,
        size: Size | None = None,
        style: "Style | None" = None,
        sampler: Literal["ddim", "euler"] = "ddim",
        seed: int = None,  # noqa: RUF013 - what many workers say
        image: "nowhere.Image" = None,
        mask: Opaque | None = None,
        masks: "list[Opaque]" = (),
        scale: float = float("nan"),
        json: str = "",
        model_name: str = "m",
        _private: int = 3,
    ) -> dict: ...


class Untyped:
    def __call__(self, streaming=False, prompt="x", steps=20): ...


class Open:
    def __call__(self, streaming=False, **payload): ...


def details(error: InvalidPayload) -> dict[str, str]:
    assert all(set(d) == {"loc", "msg", "type"} and d["loc"][0] == "body" for d in error.detail)
    json.dumps(error.detail)
    return {".".join(map(str, d["loc"][1:])): d["type"] for d in error.detail}


def test_values_are_coerced_and_defaults_are_left_to_the_call():
    bound = request_model(Typed).bind(
        {"prompt": "a cat", "steps": "7", "mode": "best", "size": {"width": 3}, "style": {"name": "oil"}}
    )
    assert bound == {"prompt": "a cat", "steps": 7, "mode": Mode.BEST, "size": Size(3), "style": Style(name="oil")}
    assert bound["mode"] is Mode.BEST


def test_values_without_a_schema_pass_untouched():
    image, mask, masks = object(), Opaque(), [Opaque()]
    bound = request_model(Typed).bind({"prompt": "x", "image": image, "mask": mask, "masks": masks})
    assert bound["image"] is image
    assert bound["mask"] is mask
    assert bound["masks"] is masks


def test_names_that_a_pydantic_model_could_not_have():
    bound = request_model(Typed).bind({"prompt": "x", "json": "{}", "model_name": "b", "_private": "4"})
    assert bound == {"prompt": "x", "json": "{}", "model_name": "b", "_private": 4}


def test_a_none_default_allows_null():
    assert request_model(Typed).bind({"prompt": "x", "seed": None}) == {"prompt": "x", "seed": None}


def test_every_problem_is_named_at_once():
    with pytest.raises(InvalidPayload) as caught:
        request_model(Typed).bind({"promt": "x", "steps": 51, "size": {"width": "wide"}, "sampler": "x"})
    assert details(caught.value) == {
        "prompt": "missing",
        "steps": "less_than_equal",
        "size.width": "int_parsing",
        "sampler": "literal_error",
        "promt": "extra_forbidden",
    }
    assert "promt: Extra inputs are not permitted; did you mean 'prompt'?" in str(caught.value)


def test_values_are_not_echoed():
    with pytest.raises(InvalidPayload) as caught:
        request_model(Typed).bind({"prompt": ["a secret"], "steps": "a secret"})
    assert "a secret" not in str(caught.value) + json.dumps(caught.value.detail)


@pytest.mark.parametrize("worker", [Typed, Untyped, Open])
@pytest.mark.parametrize("name", ["self", "streaming"])
def test_reserved_names(worker, name):
    with pytest.raises(InvalidPayload) as caught:
        request_model(worker).bind({"prompt": "x", name: True})
    assert details(caught.value) == {name: "reserved_name"}


@pytest.mark.parametrize("worker", [Typed, Untyped, Open])
@pytest.mark.parametrize("payload", [{1: 2}, [], None, "x"])
def test_what_is_not_an_object(worker, payload):
    with pytest.raises(InvalidPayload):
        request_model(worker).bind(payload)


def test_untyped_parameters():
    model = request_model(Untyped)
    marker = object()
    payload = {"prompt": marker, "steps": "7"}
    bound = model.bind(payload)
    assert bound == payload
    assert bound is not payload
    with pytest.raises(InvalidPayload) as caught:
        model.bind({"step": 1})
    assert details(caught.value) == {"step": "extra_forbidden"}
    with pytest.raises(InvalidPayload) as caught:
        request_model(lambda prompt, streaming=False: None).bind({})
    assert details(caught.value) == {"prompt": "missing"}


def test_open_signatures_take_anything():
    payload = {"func": 1, "timeout": None, "kwargs": [], "": 2}
    assert request_model(Open).bind(payload) == payload


def test_extra_values_of_a_typed_open_signature():
    class Worker:
        def __call__(self, n: int = 1, **kwargs: Any): ...

    marker = object()
    bound = request_model(Worker).bind({"n": "2", "kwargs": marker})
    assert bound == {"n": 2, "kwargs": marker}


def test_streaming_is_passed_only_where_it_is_taken():
    assert request_model(Typed).takes_streaming
    assert request_model(Open).takes_streaming
    assert not request_model(lambda a=1: a).takes_streaming
    assert not request_model(lambda streaming=False, /, a=1: a).takes_streaming


def test_positional_only_parameters():
    class Fine:
        def __call__(self, hidden=1, /, n=2): ...

    assert request_model(Fine).bind({"n": 1}) == {"n": 1}
    with pytest.raises(InvalidPayload):
        request_model(Fine).bind({"hidden": 1})

    class Hopeless:
        def __call__(self, image, /): ...

    with pytest.raises(ConfigurationError, match=r"Hopeless: .*'image'.* remove the '/'"):
        request_model(Hopeless)


def test_a_decorated_call_is_seen_through():
    def decorated(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            return function(*args, **kwargs)

        return inner

    class Worker:
        @decorated
        def __call__(self, streaming=False, *, size: "Size"): ...

    assert request_model(Worker).bind({"size": {"width": 1}}) == {"size": Size(1)}


def test_the_call_of_a_base_class_is_used():
    class Child(Typed): ...

    model = request_model(Child)
    assert model.title == "Child"
    assert model.required == ("prompt",)


def test_a_class_without_call():
    with pytest.raises(ConfigurationError, match="__call__"):
        request_model(Opaque)


def test_a_callable_without_a_signature_takes_anything():
    assert request_model(max).bind({"a": 1}) == {"a": 1}


def test_field_written_as_a_default():
    class Worker:
        def __call__(
            self,
            prompt: str = Field(min_length=2),
            tags: list[str] = Field(default_factory=list),  # noqa: B008
            n=Field(4),  # noqa: B008
        ):
            return prompt, tags, n

    model = request_model(Worker)
    assert model.required == ("prompt",)
    bound = model.bind({"prompt": "ab"})
    assert Worker()(**bound) == ("ab", [], 4)
    assert model.bind({"prompt": "ab"})["tags"] is not bound["tags"]
    with pytest.raises(InvalidPayload) as caught:
        model.bind({"prompt": "a"})
    assert details(caught.value) == {"prompt": "string_too_short"}
    assert model.json_schema()["properties"]["n"]["default"] == 4


def test_schema_of_a_typed_worker():
    schema = request_model(Typed).json_schema()
    json.dumps(schema, allow_nan=False)
    assert (schema["title"], schema["type"], schema["required"]) == ("Typed", "object", ["prompt"])
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert "streaming" not in properties
    assert properties["prompt"]["description"] == "what to draw, in words."
    assert properties["steps"] == {
        "default": 20, "maximum": 50, "minimum": 1, "title": "Steps", "type": "integer", "description": "how often.",
    }  # fmt: skip
    assert properties["mode"]["default"] == "fast"
    assert "default" not in properties["scale"]
    assert properties["masks"] == {"title": "Masks", "default": []}
    assert {"Mode", "Size", "Style"} <= set(schema["$defs"])


def test_schema_of_untyped_workers():
    assert request_model(Untyped).json_schema() == {
        "title": "Untyped",
        "type": "object",
        "properties": {"prompt": {"title": "Prompt", "default": "x"}, "steps": {"title": "Steps", "default": 20}},
        "additionalProperties": False,
    }
    assert request_model(Open).json_schema() == {
        "title": "Open", "type": "object", "properties": {}, "additionalProperties": True,
    }  # fmt: skip


def test_the_model_of_a_class_is_made_once():
    assert request_model(Typed) is request_model(Typed)


def test_untyped_workers_do_not_load_pydantic():
    code = (
        "import sys\n"
        "from drumline.signature import request_model\n"
        "class W:\n"
        "    def __call__(self, streaming=False, prompt='x', **kwargs): ...\n"
        "model = request_model(W)\n"
        "assert model.bind({'a': 1}) == {'a': 1}\n"
        "assert model.json_schema()['properties']['prompt']['default'] == 'x'\n"
        "assert 'pydantic' not in sys.modules and 'fastapi' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
