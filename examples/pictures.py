"""Draw the picture in an example's README: three previews on the way and the result, by its tiny model on CPU ranks.

python examples/pictures.py flux_ulysses                                    # writes examples/flux_ulysses/pictures.jpg
python examples/pictures.py flux_hybrid cfg=2 pipefusion=1 ulysses=1 -n 2   # with arguments of setup
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from drumline.cli.values import parse
from drumline.distributed import DistributedRunner

HERE = Path(__file__).parent
SIDE, GAP = 192, 8
REQUEST = {"prompt": "a lighthouse at dusk", "width": SIDE, "height": SIDE, "num_inference_steps": 16, "seed": 7}


async def drawn(example: Path, ranks: int | None, setup: dict[str, Any]) -> list[Image.Image]:
    """Return the previews at the steps 1, 6 and 11, and the result."""
    spec = yaml.safe_load((example / "app.yaml").read_text())["spec"]
    app = f"{example / 'app.py'}:{spec['workerClass'].partition(':')[2]}"
    runner = DistributedRunner(app, world_size=ranks or spec["numGPUs"], device="cpu")
    await runner.start(model="tiny", **setup)
    try:
        images = [update["image"] async for update in runner.stream(REQUEST) if "image" in update]
    finally:
        await runner.stop()
    return [*images[:3], images[-1]]


def main() -> None:
    """Draw the example that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("example")
    parser.add_argument("setup", nargs="*")
    parser.add_argument("-n", type=int, default=None)
    args = parser.parse_args()
    images = asyncio.run(drawn(HERE / args.example, args.n, parse(args.setup)))
    width, height = images[0].size
    sheet = Image.new("RGB", (len(images) * (width + GAP) - GAP, height), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place * (width + GAP), 0))
    sheet.save(HERE / args.example / "pictures.jpg", quality=85)


if __name__ == "__main__":
    main()
