"""Train an example's tiny model on two ranks, kill a rank halfway, go on, and draw the losses.

python examples/loss_curve.py lm_fsdp steps=150        # writes examples/lm_fsdp/loss.svg
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from drumline.cli.values import parse
from drumline.distributed import DistributedRunner
from drumline.errors import RankLost
from drumline.toolkit import Image as PictureFile

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, BOTTOM = 720, 300, 46, 34
COLOURS = ("#1f6feb", "#d1570b")

Curve = list[tuple[int, float]]


async def losses(example: Path, request: dict[str, Any]) -> list[Curve]:
    """Return the losses by step: until the kill, and from the last checkpoint on."""
    name = yaml.safe_load((example / "app.yaml").read_text())["spec"]["workerClass"].partition(":")[2]
    runner = DistributedRunner(f"{example / 'app.py'}:{name}", world_size=2, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        await runner.start(model="tiny", checkpoints=folder)
        try:
            first: Curve = []
            try:
                async for update in runner.stream(request):
                    note(first, update)
                    if first and first[-1][0] == request["steps"] // 2:
                        kill(runner.status.ranks[1].pid)
            except RankLost as error:
                print(error)
            second: Curve = []
            async for update in runner.stream(request):
                note(second, update)
        finally:
            await runner.stop()
    return [first, second]


def discs(count: int = 6, side: int = 64) -> dict[str, Any]:
    """Return pictures of coloured discs, and captions, for the example that learns from pictures."""
    pictures = []
    for i in range(count):
        picture = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(picture).ellipse((8, 8, side - 8, side - 8), fill=f"hsl({i * 360 // count}, 80%, 50%)")
        pictures.append(PictureFile.from_pil(picture, "png").model_dump())
    return {"images": pictures, "captions": [f"a disc, number {i}" for i in range(count)], "size": side}


def kill(pid: int | None) -> None:
    """End a rank at once, as the kernel does when memory runs out."""
    assert pid
    os.kill(pid, signal.SIGKILL)


def note(curve: Curve, update: dict[str, Any]) -> None:
    """Add a progress update to a curve."""
    progress = update.get("progress", {})
    if "loss" in progress:
        curve.append((int(progress["done"]), progress["loss"]))


def drawn(curves: list[Curve], title: str) -> str:
    """Return the losses as an SVG picture, with the step at which a rank was killed."""
    killed, top = curves[0][-1][0], max(loss for curve in curves for _, loss in curve)
    return plot(curves, title, mark=(killed, f"a rank is killed at step {killed}; "
                                             f"the run goes on from step {curves[1][0][0] - 1}", top))  # fmt: skip


def plot(curves: list[Curve], title: str, mark: tuple[int, str, float] | None = None) -> str:
    """Return curves as an SVG picture; ``mark``: a place on the first axis, what is said of it, and the second's end."""
    points = [point for curve in curves for point in curve]
    steps, top = max(step for step, _ in points), max(loss for _, loss in points)

    def place(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 12) * step / steps
        return f"{x:.1f},{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 30) * loss / top:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="18">{title}</text>',
        f'<polyline points="{place(0, top)} {place(0, 0)} {place(steps, 0)}" fill="none" stroke="#888"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(steps * share, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 18:.1f}" text-anchor="middle">{steps * share:.0f}</text>')
        x, y = place(0, top * share).split(",")
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{top * share:.1f}</text>')
    for curve, colour in zip(curves, COLOURS, strict=True):
        line = " ".join(place(*point) for point in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    if mark is not None:
        at, words, high = mark
        x, y = place(at, high * 0.9).split(",")
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{y}" y2="{HEIGHT - BOTTOM}" stroke="{COLOURS[0]}" stroke-dasharray="3 3"/>'
        )
        parts.append(f'<text x="{float(x) + 5:.1f}" y="{y}">{words}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Draw the curve of the example that the command line names."""
    name, *values = sys.argv[1:]
    request = {"run": "plot", "steps": 150, "checkpoint_every": 20, **parse(values)}
    if name == "flux_lora_ddp":
        request = {**discs(), **request}
    curves = asyncio.run(losses(HERE / name, request))
    options = ", ".join(f"{key}={value}" for key, value in parse(values).items() if key != "steps")
    title = f"{name}: loss by step, tiny model, two CPU ranks" + (f", {options}" if options else "")
    (HERE / name / "loss.svg").write_text(drawn(curves, title))


if __name__ == "__main__":
    main()
