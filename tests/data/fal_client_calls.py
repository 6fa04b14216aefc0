"""Calls an app with the unmodified ``fal_client`` in every way it has: prints one line of JSON."""

import asyncio
import json
import sys

import fal_client

APP = sys.argv[1]
ARGUMENTS = {"prompt": "a cat", "width": 64, "height": 64, "num_inference_steps": 6}


async def asynchronous() -> dict:
    updates = [event async for event in fal_client.stream_async(APP, arguments=ARGUMENTS)]
    return {"run_async": await fal_client.run_async(APP, arguments=ARGUMENTS), "stream_async": updates}


def refused() -> dict:
    try:
        fal_client.run(APP, arguments={"prompt": 1})
    except fal_client.FalClientHTTPError as error:
        return {"status": error.status_code, "message": str(error)}
    return {}


found = {
    "run": fal_client.run(APP, arguments=ARGUMENTS),
    "stream": list(fal_client.stream(APP, arguments=ARGUMENTS)),
    **asyncio.run(asynchronous()),
    "refused": refused(),
}
print(json.dumps(found))
