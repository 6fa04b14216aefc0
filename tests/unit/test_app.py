"""``drumline.App`` as a class: settings, endpoints, hints, requirements."""

import asyncio
import logging
import subprocess
import sys
from importlib.metadata import version

import pytest

import drumline
from drumline import app as apps
from drumline import context
from drumline.contract import RunnerSettings
from drumline.errors import ConfigurationError, SetupFailed
from drumline.requirements import differences

SETTINGS = RunnerSettings(startup_timeout=5)


# --- settings


def test_settings_are_attributes_or_class_keywords():
    class ByAttribute(drumline.App):
        num_gpus = 2
        machine_type = ["GPU-H100", "GPU-A100"]  # noqa: RUF012
        keep_alive = 300

    class ByKeyword(
        drumline.App, num_gpus=2, machine_type="GPU-H100", keep_alive=300, name="sdxl", python_version="3.11"
    ):
        min_concurrency = 1

    assert (ByAttribute().num_gpus, ByAttribute.keep_alive, ByAttribute.app_name) == (2, 300, None)
    assert (ByKeyword().num_gpus, ByKeyword.machine_type, ByKeyword.app_name) == (2, "GPU-H100", "sdxl")

    class Child(ByKeyword, num_gpus=4):
        pass

    assert (Child.num_gpus, Child.app_name, ByKeyword.num_gpus, drumline.App.num_gpus) == (4, "sdxl", 2, 1)


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match=r"class Sdxl: drumline\.App has no setting 'num_gpu'; did you mean 'num_gpus'"):

        class Sdxl(drumline.App, num_gpu=2):
            pass


# --- endpoints


def test_endpoints_of_a_class_and_its_bases():
    class Base(drumline.App):
        @drumline.endpoint("/")
        def run(self): ...

        @drumline.endpoint("/old")
        def old(self): ...

    class Child(Base):
        @drumline.endpoint("/stream")
        async def stream(self): ...

        def old(self): ...

        @property
        def broken(self):
            raise AssertionError("must not be read")

    assert apps.endpoints(Child) == [apps.Endpoint("/", "run"), apps.Endpoint("/stream", "stream")]


@pytest.mark.parametrize("path", ["", "run", None, 3])
def test_a_path_is_absolute(path):
    with pytest.raises(ConfigurationError, match="starts with '/'"):
        drumline.endpoint(path)


def test_a_method_has_one_path():
    with pytest.raises(ConfigurationError, match=r"run already serves /a"):

        class Twice(drumline.App):
            @drumline.endpoint("/b")
            @drumline.endpoint("/a")
            def run(self): ...


def test_a_path_has_one_method():
    class Double(drumline.App):
        @drumline.endpoint("/a")
        def one(self): ...

        @drumline.endpoint("/a")
        def two(self): ...

    for check in (apps.endpoints, drumline.wrap_app):
        with pytest.raises(ConfigurationError, match=r"Double\.one and Double\.two both serve /a"):
            check(Double)


@pytest.mark.parametrize(
    "path", ["/healthz", "/status", "/docs", "/docs/more", "/requests/{id}", "/metrics", "/readyz"]
)
def test_reserved_paths(path):
    class Clash(drumline.App):
        @drumline.endpoint(path)
        def mine(self): ...

    with pytest.raises(ConfigurationError, match=rf"Clash\.mine: .* belongs to the server; .*than {path}"):
        apps.endpoints(Clash)


@pytest.mark.parametrize("path", ["/statuses", "/healthz2", "/my/status", "/{anything}"])
def test_paths_that_only_look_reserved(path):
    class Fine(drumline.App):
        @drumline.endpoint(path)
        def mine(self): ...

    assert apps.endpoints(Fine) == [apps.Endpoint(path, "mine")]


def test_wrap_app_takes_apps():
    for wrong in (drumline.App(), dict, "App", None):
        with pytest.raises(ConfigurationError, match=r"takes a subclass of drumline\.App"):
            drumline.wrap_app(wrong)


# --- hints


def test_no_hints_and_hints(caplog):
    class Silent(drumline.App):
        pass

    class Speaking(drumline.App):
        given = ["sdxl", "bad\nheader", "a,b", "ünïcode", "lora-7"]  # noqa: RUF012

        def provide_hints(self):
            return self.given

    class Broken(drumline.App):
        def provide_hints(self):
            raise RuntimeError("no hints today")

    assert apps.hints(Silent()) is None
    assert apps.hints(Speaking()) == "sdxl,lora-7"
    assert apps.hints(Broken()) is None
    assert "hints of Speaking that do not fit a header" in caplog.text
    assert "no hints today" in caplog.text


# --- life


async def test_requirements_are_one_warning(caplog):
    class Picky(drumline.App):
        requirements = [["pydantic==1.0"], "surely-not-installed>=3", "fal==1.2.3"]  # noqa: RUF012

    with caplog.at_level(logging.WARNING):
        await apps.open_app(Picky(), SETTINGS)
    (record,) = caplog.records
    assert record.getMessage() == (
        "Picky asks for other packages than are installed: "
        f"pydantic==1.0 (installed: {version('pydantic')}); surely-not-installed>=3 (not installed)"
    )


@pytest.mark.parametrize(
    "line",
    [
        "pydantic", f"pydantic=={version('pydantic')}", "Pydantic>=2", "fal", "fal==9.9.9", "-r more.txt", "--extra-index-url",
        "https://download.pytorch.org/whl/cu124", "pydantic==1; python_version < '3'", "./local", ".[extra]", "-e .",
        "git+https://example.com/x.git", "x @ https://example.com/x.whl", "", "  # a comment", "pydantic>=2  # a comment",
    ],
)  # fmt: skip
def test_requirements_that_hold_or_say_nothing(line):
    assert differences([line]) == []


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_setup_and_its_time(asynchronous):
    if asynchronous:

        class Slow(drumline.App, startup_timeout=0.05):
            async def setup(self):
                await asyncio.Event().wait()
    else:
        release = asyncio.Event()
        loop = asyncio.get_running_loop()

        class Slow(drumline.App, startup_timeout=0.05):
            def setup(self):
                asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

    try:
        with pytest.raises(SetupFailed, match=r"setup\(\) of Slow took longer than startup_timeout \(0\.05 s\)"):
            await apps.open_app(Slow(), SETTINGS)
    finally:
        if not asynchronous:
            release.set()


@pytest.mark.parametrize("error", [ValueError("mine"), TimeoutError("mine, too")])
async def test_what_setup_raises_comes_through(error):
    class Failing(drumline.App):
        def setup(self):
            raise error

    with pytest.raises(type(error)) as caught:
        await apps.open_app(Failing(), SETTINGS)
    assert str(caught.value) == str(error)


async def test_a_sync_setup_does_not_block_the_loop():
    loop = asyncio.get_running_loop()

    async def answer() -> str:
        return "the loop is free"

    class Sync(drumline.App):
        def setup(self):
            self.heard = asyncio.run_coroutine_threadsafe(answer(), loop).result(timeout=4)

    app = Sync()
    await apps.open_app(app, SETTINGS)
    assert app.heard == "the loop is free"


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_settings_hold_for_runners_that_setup_makes(asynchronous):
    settings = SETTINGS.model_copy(update={"device": "cpu", "backend": "gloo", "max_queue_depth": 3, "revision": "r7"})

    class Mine(drumline.App):
        def make(self):
            self.plain = drumline.DistributedRunner("drumline.testing.workers:Echo")
            self.own = drumline.DistributedRunner("drumline.testing.workers:Echo", max_queue_depth=9, device="auto")

        if asynchronous:

            async def setup(self):
                self.make()
        else:

            def setup(self):
                self.make()

    app = Mine()
    task = asyncio.create_task(apps.open_app(app, settings))
    await task
    plain, own = app.plain, app.own
    assert (plain.device, plain.backend, plain.max_queue_depth, plain.revision) == ("cpu", "gloo", 3, "r7")
    assert (own.device, own.backend, own.max_queue_depth) == ("auto", "gloo", 9)
    assert context.preset() == context.Preset()  # nothing of it is left here


def test_no_request_outside_of_one():
    assert drumline.App().current_request is None


# --- public names


def test_every_public_name_is_there():
    for name in drumline.__all__:
        assert getattr(drumline, name) is not None, name
    assert set(drumline.__all__) <= set(dir(drumline))
    assert drumline.__version__ == version("drumline")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        drumline.nothing  # noqa: B018


def test_importing_drumline_is_cheap():
    code = (
        "import time; began = time.perf_counter(); import drumline; took = time.perf_counter() - began\n"
        "import sys; heavy = {'torch', 'fastapi', 'pydantic', 'numpy', 'PIL', 'yaml', 'zmq'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert took < 0.3, took\n"
        "drumline.App, drumline.endpoint, drumline.wrap_app, drumline.DistributedWorker\n"
        "heavy = {'torch', 'fastapi', 'zmq'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
