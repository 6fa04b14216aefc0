"""What people and clients write: whatever it is, it is understood or refused with a typed error."""

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from drumline import targets
from drumline.api.manifests import load_manifest, to_settings
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError, InvalidPayload
from drumline.toolkit import File
from drumline.toolkit.fetch import decode_data_uri, fetch, is_public
from drumline.toolkit.repositories import repository_for


@given(text=st.text(max_size=40) | st.from_regex(r"[a-z./:~]{0,12}(\.py|\.yaml)?(:[A-Z.]{0,3})?", fullmatch=True))
@example(text="~nobody/app.py")
@example(text="\0.py")
@example(text="a" * 5000 + ".py")
@example(text="a" * 5000)
@example(text="app.py:" + "A" * 5000)
def test_any_target(text, tmp_path_factory):
    try:
        target = targets.parse(text, folder=tmp_path_factory.getbasetemp())
    except ConfigurationError:
        return
    assert target.kind == "module"
    assert target.reference.endswith(f":{target.class_name}")


@given(data=st.binary(max_size=200))
def test_files_survive_their_own_url(data):
    assert File.model_validate_json(File.from_bytes(data).model_dump_json()).as_bytes() == data


@given(
    body=st.text(max_size=40), head=st.sampled_from(["", "image/png", "image/png;base64", ";base64", "a;b=c;base64"])
)
def test_any_data_uri(body, head):
    try:
        data, _ = decode_data_uri(f"data:{head},{body}", max_bytes=20)
    except InvalidPayload as error:
        loc = error.detail[0]["loc"]
    else:
        loc = ["body", "url"]
        assert len(data) <= 20
    assert loc == ["body", "url"]


@given(text=st.text(max_size=30))
@example(text="http://[")
@example(text="http://[::1")
@example(text="http://\udcff/")
@example(text="http://a..b/")
@example(text="http://" + "a" * 300)
@example(text="http://[fe80::1%25lo]/")
@example(text="http://127.0.0.1:0/")
@example(text="http://127.0.0.1:-1/")
@example(text="http://localhost:٣/")
def test_any_url_of_a_stranger(text):
    with pytest.raises(InvalidPayload):
        fetch(text if "://" in text else f"file://{text}", timeout=1)


@given(text=st.text(max_size=50) | st.ip_addresses().map(str))
def test_any_address(text):
    assert is_public(text) in {True, False}


@given(
    text=st.text(max_size=30) | st.text(max_size=20).map("s3://{}".format) | st.text(max_size=20).map("dir:{}".format)
)
@example(text="s3://[")
def test_any_repository(text):
    try:
        repository = repository_for(text)
    except ConfigurationError:
        return
    except Exception as error:  # boto3's own words about a bucket, region or credentials
        assert text.startswith("s3:"), error
        return
    assert callable(repository.save)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(
    [
        "workerClass",
        "numGPUs",
        "worldSize",
        "env",
        "serving",
        "setupArgs",
        "warmupPayload",
        "image",
        "source",
        "rollout",
    ]
)


@given(spec=st.dictionaries(fields | st.text(max_size=6), plain, max_size=6), good=st.booleans())
def test_any_manifest(spec, good, tmp_path_factory):
    if good:
        spec = {**spec, "workerClass": "app:Worker"}
    document = {
        "apiVersion": "drumline.dev/v1alpha1",
        "kind": "DistributedApp",
        "metadata": {"name": "a"},
        "spec": spec,
    }
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    try:
        settings = to_settings(load_manifest(path))
    except ConfigurationError as error:
        assert "any.yaml" in str(error) or "DRUMLINE_" in str(error)
    else:
        assert RunnerSettings.from_env(settings.to_env()) == settings
